alter table forum.flags add column weight numeric(6, 2) not null default 1;
