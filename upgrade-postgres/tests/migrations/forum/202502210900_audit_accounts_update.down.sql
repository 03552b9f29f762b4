drop trigger audit on forum.accounts;
create trigger audit after insert or delete on forum.accounts for each row execute function forum.audit_accounts();
