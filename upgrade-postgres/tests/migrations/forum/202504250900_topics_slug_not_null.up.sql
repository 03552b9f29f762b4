alter table forum.topics add constraint slug_there check (slug is not null) not valid;
alter table forum.topics validate constraint slug_there;
alter table forum.topics alter column slug set not null;
alter table forum.topics drop constraint slug_there;
