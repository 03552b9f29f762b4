alter table forum.accounts add column bio text not null default '';
