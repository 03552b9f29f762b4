drop table forum.audit_rest;
