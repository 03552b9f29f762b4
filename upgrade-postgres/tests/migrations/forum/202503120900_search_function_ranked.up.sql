create or replace function forum.find(words text) returns setof forum.posts language sql stable as $$
    select * from forum.posts where search @@ plainto_tsquery('simple', words)
    order by ts_rank(search, plainto_tsquery('simple', words)) desc, id
$$;
