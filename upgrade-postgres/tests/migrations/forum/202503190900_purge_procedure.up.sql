create procedure forum.purge_sessions() language sql as $$ delete from forum.sessions where expires_at < now() $$;
