drop table forum.posts;
