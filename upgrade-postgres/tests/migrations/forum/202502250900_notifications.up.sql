create table forum.notifications (
    id uuid primary key default gen_random_uuid(),
    account bigint not null references forum.accounts on delete cascade,
    kind text not null,
    payload jsonb not null
);
