revoke select on all tables in schema reports from public;
revoke usage on schema reports from public;
