drop table forum.accounts;
