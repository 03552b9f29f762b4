drop index forum.audit_detail;
