alter table forum.flags drop column weight;
