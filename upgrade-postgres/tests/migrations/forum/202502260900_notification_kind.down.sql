alter table forum.notifications drop constraint known_kind;
