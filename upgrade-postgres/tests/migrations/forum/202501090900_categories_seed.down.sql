delete from forum.categories;
