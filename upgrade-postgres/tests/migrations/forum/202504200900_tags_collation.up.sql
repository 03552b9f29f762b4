alter table forum.tags alter column label type text collate forum.plain;
