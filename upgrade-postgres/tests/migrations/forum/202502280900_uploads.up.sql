create table forum.uploads (
    id bigint generated always as identity primary key,
    owner bigint references forum.accounts on delete set null,
    bytes bigint not null check (bytes >= 0),
    kilobytes bigint generated always as (bytes / 1024) stored
);
