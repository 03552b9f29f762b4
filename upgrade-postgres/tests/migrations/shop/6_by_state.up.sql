-- no-transaction
create index concurrently orders_by_state on orders (state);
alter table orders add column note text;
create index concurrently on orders (note);
