create table forum.topics (
    id bigint generated always as identity primary key,
    category int not null references forum.categories,
    author bigint not null references forum.accounts,
    title text not null check (length(title) between 3 and 200),
    pinned boolean not null default false,
    created_at timestamptz not null default now()
);
