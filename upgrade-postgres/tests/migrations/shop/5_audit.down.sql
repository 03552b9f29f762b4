drop trigger audited on customers;
drop function note();
drop table audit;
