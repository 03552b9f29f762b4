alter table forum.categories rename column position to sort_order;
