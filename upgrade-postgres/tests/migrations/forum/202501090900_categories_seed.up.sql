insert into forum.categories (id, parent, title) values (1, null, 'General'), (2, 1, 'Help'), (3, 1, 'Off topic');
select setval(pg_get_serial_sequence('forum.categories', 'id'), 3);
