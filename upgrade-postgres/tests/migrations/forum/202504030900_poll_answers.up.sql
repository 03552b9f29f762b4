create table forum.poll_answers (
    topic bigint references forum.polls on delete cascade,
    account bigint references forum.accounts on delete cascade,
    choice int not null,
    primary key (topic, account)
);
