create table forum.tags (
    id int generated always as identity primary key,
    label text not null unique
);
