drop procedure forum.purge_sessions();
