create unlogged table forum.sessions (
    token text primary key,
    account bigint not null references forum.accounts on delete cascade,
    expires_at timestamptz not null
);
create index sessions_expiry on forum.sessions (expires_at);
