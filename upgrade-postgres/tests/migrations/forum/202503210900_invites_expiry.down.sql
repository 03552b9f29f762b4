alter table forum.invites drop column expires_on;
