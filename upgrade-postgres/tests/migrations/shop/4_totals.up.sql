create view totals as select customer, sum(total) as total from orders group by customer;
