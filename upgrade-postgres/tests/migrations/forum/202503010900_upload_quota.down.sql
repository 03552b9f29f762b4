alter table forum.accounts drop column quota;
