alter table forum.topics alter column slug drop not null;
