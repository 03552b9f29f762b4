insert into forum.topics (category, author, title)
select 1 + n % 3, a.id, 'Topic ' || n from generate_series(1, 30) n join forum.accounts a on a.name = 'Ann';
