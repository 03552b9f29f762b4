insert into forum.votes (post, account, value)
select p.id, a.id, 1 from forum.posts p join forum.accounts a on a.name = 'Bob' where p.id % 3 = 0;
