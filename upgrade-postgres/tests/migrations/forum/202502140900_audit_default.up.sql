create table forum.audit_rest partition of forum.audit default;
