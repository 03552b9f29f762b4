drop table forum.account_badges;
