drop table forum.tags;
