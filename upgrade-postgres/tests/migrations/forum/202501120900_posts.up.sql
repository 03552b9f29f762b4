create table forum.posts (
    id bigint generated always as identity primary key,
    topic bigint not null references forum.topics on delete cascade,
    author bigint references forum.accounts on delete set null,
    body text not null,
    created_at timestamptz not null default now(),
    edited_at timestamptz
);
