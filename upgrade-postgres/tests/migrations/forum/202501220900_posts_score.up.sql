alter table forum.posts add column score int not null default 0;
