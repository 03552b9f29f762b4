create function forum.count_vote() returns trigger language plpgsql as $$
begin
    if tg_op in ('UPDATE', 'DELETE') then
        update forum.posts set score = score - old.value where id = old.post;
    end if;
    if tg_op in ('UPDATE', 'INSERT') then
        update forum.posts set score = score + new.value where id = new.post;
    end if;
    return null;
end
$$;
create trigger count_vote after insert or update or delete on forum.votes
    for each row execute function forum.count_vote();
