drop table forum.sessions;
