do $$
declare
    wanted text;
begin
    foreach wanted in array array['citext', 'pg_trgm', 'btree_gist'] loop
        if exists (select from pg_available_extensions where name = wanted) then
            execute format('create extension if not exists %I', wanted);
        end if;
    end loop;
end
$$;
