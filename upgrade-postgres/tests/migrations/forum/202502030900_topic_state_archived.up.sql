alter type forum.topic_state rename to topic_state_before;
create type forum.topic_state as enum ('open', 'closed', 'archived');
alter table forum.topics alter column state drop default,
    alter column state type forum.topic_state using state::text::forum.topic_state,
    alter column state set default 'open';
drop type forum.topic_state_before;
