alter sequence forum.flags_id_seq rename to reports_id_seq;
alter index forum.flags_pkey rename to reports_pkey;
alter table forum.flags rename to reports;
alter table forum.reports rename constraint reports_post_fkey to reports_post_fkey_x;
alter table forum.reports rename constraint reports_post_fkey_x to reports_post_fkey;
