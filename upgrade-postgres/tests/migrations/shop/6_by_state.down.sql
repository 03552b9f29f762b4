-- no-transaction
drop index concurrently orders_by_state;
alter table orders drop column note;
