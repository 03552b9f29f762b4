alter table forum.accounts alter column bio drop not null, alter column bio drop default;
