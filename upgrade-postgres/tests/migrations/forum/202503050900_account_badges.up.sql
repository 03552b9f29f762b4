create table forum.account_badges (
    account bigint references forum.accounts on delete cascade,
    badge int references forum.badges on delete cascade,
    given_at timestamptz not null default now(),
    primary key (account, badge)
);
