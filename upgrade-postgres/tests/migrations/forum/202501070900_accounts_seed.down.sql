delete from forum.accounts;
