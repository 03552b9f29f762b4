drop table forum.topic_tags;
