create table forum.topic_tags (
    topic bigint not null references forum.topics on delete cascade,
    tag int not null references forum.tags on delete cascade,
    primary key (topic, tag)
);
create index topic_tags_by_tag on forum.topic_tags (tag);
