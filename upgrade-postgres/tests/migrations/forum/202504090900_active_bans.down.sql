drop function forum.is_banned(bigint, timestamptz);
