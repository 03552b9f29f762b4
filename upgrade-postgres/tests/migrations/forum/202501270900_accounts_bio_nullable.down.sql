update forum.accounts set bio = '' where bio is null;
alter table forum.accounts alter column bio set default '', alter column bio set not null;
