create table forum.accounts (
    id bigint generated always as identity primary key,
    name text not null,
    email forum.email not null,
    trust forum.trust_level not null default 'new',
    created_at timestamptz not null default now()
);
comment on table forum.accounts is 'Who may write.';
