grant usage on schema reports to public;
grant select on all tables in schema reports to public;
