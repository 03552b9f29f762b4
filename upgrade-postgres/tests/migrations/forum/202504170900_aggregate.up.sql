create function reports.longer(a text, b text) returns text language sql immutable as $$
    select case when length(b) > length(a) or a is null then b else a end
$$;
create aggregate reports.longest(text) (sfunc = reports.longer, stype = text);
