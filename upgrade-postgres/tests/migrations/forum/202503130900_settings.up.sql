create table forum.settings (
    name text primary key,
    value jsonb not null
);
insert into forum.settings values ('title', '"A forum"'), ('per_page', '20');
