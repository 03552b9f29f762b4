alter table notes add column words integer;
comment on column notes.words is 'How many words the note has; of older notes, filled in by the upgrade to 2.0.0.';
