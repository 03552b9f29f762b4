create index posts_by_topic on forum.posts (topic, id);
