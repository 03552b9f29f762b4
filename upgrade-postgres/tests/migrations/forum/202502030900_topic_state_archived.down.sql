alter type forum.topic_state rename to topic_state_after;
create type forum.topic_state as enum ('open', 'closed');
update forum.topics set state = 'closed' where state = 'archived';
alter table forum.topics alter column state drop default,
    alter column state type forum.topic_state using state::text::forum.topic_state,
    alter column state set default 'open';
drop type forum.topic_state_after;
