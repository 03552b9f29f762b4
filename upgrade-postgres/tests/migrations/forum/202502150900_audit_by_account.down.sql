drop index forum.audit_by_account;
