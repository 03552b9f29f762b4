drop table forum.invites;
