alter table forum.topics drop column state;
drop type forum.topic_state;
