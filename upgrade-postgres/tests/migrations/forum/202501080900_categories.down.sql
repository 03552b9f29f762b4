drop table forum.categories;
