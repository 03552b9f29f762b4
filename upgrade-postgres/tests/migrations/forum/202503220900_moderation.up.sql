create table forum.reports (
    id bigint generated always as identity primary key,
    post bigint not null references forum.posts on delete cascade,
    reason text not null,
    closed boolean not null default false
);
