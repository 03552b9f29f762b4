create table forum.audit (
    at timestamptz not null default now(),
    account bigint,
    what text not null,
    detail jsonb not null default '{}'
) partition by range (at);
