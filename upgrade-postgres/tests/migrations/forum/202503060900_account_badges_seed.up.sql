insert into forum.account_badges (account, badge)
select a.id, b.id from forum.accounts a, forum.badges b where b.title = 'First post';
