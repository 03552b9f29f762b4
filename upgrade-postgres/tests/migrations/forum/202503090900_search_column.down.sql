alter table forum.posts drop column search;
