delete from forum.account_badges;
