alter table forum.accounts add column quota bigint not null default 10485760;
