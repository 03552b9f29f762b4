create type forum.topic_state as enum ('open', 'closed');
alter table forum.topics add column state forum.topic_state not null default 'open';
