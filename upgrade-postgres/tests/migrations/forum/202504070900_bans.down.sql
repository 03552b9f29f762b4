drop table forum.bans;
