drop index forum.posts_by_topic;
