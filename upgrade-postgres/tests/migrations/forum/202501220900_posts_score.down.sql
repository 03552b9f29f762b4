alter table forum.posts drop column score;
