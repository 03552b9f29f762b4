insert into forum.tags (label) select 'tag ' || n from generate_series(1, 10) n;
insert into forum.topic_tags select t.id, g.id from forum.topics t join forum.tags g on g.id % 3 = t.id % 3;
