alter table customers add column email text;
update customers set email = lower(name) || '@example.org';
