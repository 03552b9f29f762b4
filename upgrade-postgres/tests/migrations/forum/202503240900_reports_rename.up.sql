alter table forum.reports rename to flags;
alter index forum.reports_pkey rename to flags_pkey;
alter sequence forum.reports_id_seq rename to flags_id_seq;
