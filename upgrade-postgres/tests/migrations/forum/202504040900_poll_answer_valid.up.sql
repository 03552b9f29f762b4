create function forum.check_answer() returns trigger language plpgsql as $$
begin
    if new.choice > (select cardinality(choices) from forum.polls where topic = new.topic) then
        raise exception 'there is no choice %', new.choice using errcode = 'check_violation';
    end if;
    return new;
end
$$;
create constraint trigger check_answer after insert or update on forum.poll_answers
    deferrable initially deferred for each row execute function forum.check_answer();
