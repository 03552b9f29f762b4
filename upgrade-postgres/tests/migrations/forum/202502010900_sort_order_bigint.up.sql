alter table forum.categories alter column sort_order type bigint;
