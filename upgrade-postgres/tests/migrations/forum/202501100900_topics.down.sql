drop table forum.topics;
