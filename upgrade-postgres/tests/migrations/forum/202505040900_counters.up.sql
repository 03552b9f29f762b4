create table forum.counters (account bigint primary key references forum.accounts on delete cascade, posts int not null default 0);
insert into forum.counters select a.id, count(p.id) from forum.accounts a left join forum.posts p on p.author = a.id group by a.id;
