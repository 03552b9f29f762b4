alter table forum.sessions reset (fillfactor, autovacuum_vacuum_scale_factor);
