create function forum.audit_posts() returns trigger language plpgsql as $$
begin
    insert into forum.audit (at, what, detail)
    values ('2026-02-03', tg_op || ' posts', jsonb_build_object('id', coalesce(new.id, old.id)));
    return null;
end
$$;
create trigger audit after insert or delete on forum.posts for each row execute function forum.audit_posts();
