alter table forum.invites add column expires_on date;
