insert into forum.messages (sender, recipient, body)
select a.id, b.id, 'hello ' || b.name from forum.accounts a, forum.accounts b where a.id <> b.id;
