alter table forum.categories rename column sort_order to position;
