create function forum.log(what text, detail jsonb default '{}') returns void
language sql as $$ insert into forum.audit (what, detail) values (what, detail) $$;
