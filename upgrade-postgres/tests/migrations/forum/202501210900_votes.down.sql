drop table forum.votes;
