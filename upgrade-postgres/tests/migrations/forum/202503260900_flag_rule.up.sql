create view forum.open_flags as select id, post, reason from forum.flags where not closed;
create rule close as on delete to forum.open_flags do instead update forum.flags set closed = true where id = old.id;
