insert into forum.posts (topic, author, body)
select t.id, t.author, 'Post ' || n || ' of ' || t.title from forum.topics t, generate_series(1, 4) n;
