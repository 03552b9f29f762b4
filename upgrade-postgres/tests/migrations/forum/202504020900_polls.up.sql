create table forum.polls (
    topic bigint primary key references forum.topics on delete cascade,
    choices text[] not null check (cardinality(choices) between 2 and 10)
);
