create index audit_by_account on forum.audit (account, at);
