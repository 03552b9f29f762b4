create function forum.touch() returns trigger language plpgsql as $$
begin
    new.edited_at := clock_timestamp();
    return new;
end
$$;
