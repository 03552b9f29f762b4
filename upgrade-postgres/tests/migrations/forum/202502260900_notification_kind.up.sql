alter table forum.notifications add constraint known_kind
    check (kind in ('reply', 'mention', 'vote')) not valid;
alter table forum.notifications validate constraint known_kind;
