create table orders (id bigint generated always as identity primary key, customer int not null references customers, total numeric not null, state order_state not null default 'open');
insert into orders (customer, total) select id, id * 10 from customers;
