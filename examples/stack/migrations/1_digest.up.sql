alter table notes add column digest text;
create view note_digests as select id, digest from notes;
