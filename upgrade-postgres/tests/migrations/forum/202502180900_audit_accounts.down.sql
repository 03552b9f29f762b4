drop trigger audit on forum.accounts;
drop function forum.audit_accounts();
