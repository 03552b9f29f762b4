drop view note_digests;
alter table notes drop column digest;
