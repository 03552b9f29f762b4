alter table forum.accounts drop column bio;
