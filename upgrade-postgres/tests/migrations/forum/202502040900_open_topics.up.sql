create view forum.open_topics as select * from forum.topics where state = 'open' with check option;
