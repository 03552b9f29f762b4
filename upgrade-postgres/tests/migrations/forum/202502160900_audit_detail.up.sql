create index audit_detail on forum.audit using gin (detail);
