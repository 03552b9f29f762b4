create table forum.votes (
    post bigint not null references forum.posts on delete cascade,
    account bigint not null references forum.accounts on delete cascade,
    value smallint not null check (value in (-1, 1)),
    primary key (post, account)
);
