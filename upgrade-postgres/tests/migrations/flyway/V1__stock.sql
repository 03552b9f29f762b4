create table stock (item text primary key, amount int not null, wanted order_state);
insert into stock (item, amount) values ('bolt', 10), ('nut', 20);
