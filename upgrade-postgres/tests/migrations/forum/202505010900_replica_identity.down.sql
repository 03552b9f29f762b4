alter table forum.account_badges replica identity default;
