create function forum.same_name(a text, b text) returns boolean language sql immutable as $$ select lower(a) = lower(b) $$;
create operator forum.=~= (leftarg = text, rightarg = text, function = forum.same_name);
