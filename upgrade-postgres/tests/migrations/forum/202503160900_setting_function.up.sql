create function forum.setting(wanted text) returns jsonb language sql stable as $$
    select value from forum.settings where name = wanted
$$;
