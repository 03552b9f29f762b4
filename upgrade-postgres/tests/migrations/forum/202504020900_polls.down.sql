drop table forum.polls;
