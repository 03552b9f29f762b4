create function forum.is_banned(who bigint, at timestamptz default now()) returns boolean language sql stable as $$
    select exists (select from forum.bans where account = who and during @> at)
$$;
