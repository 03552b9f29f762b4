alter table forum.topics drop column slug;
