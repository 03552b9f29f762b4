delete from forum.topic_tags;
delete from forum.tags;
