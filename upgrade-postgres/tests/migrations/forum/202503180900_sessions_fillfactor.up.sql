alter table forum.sessions set (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.05);
