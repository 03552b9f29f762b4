create table forum.bans (
    account bigint not null references forum.accounts,
    during tstzrange not null,
    reason text not null
);
