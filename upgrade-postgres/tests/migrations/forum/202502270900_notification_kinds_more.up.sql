alter table forum.notifications drop constraint known_kind;
alter table forum.notifications add constraint known_kind check (kind in ('reply', 'mention', 'vote', 'badge'));
