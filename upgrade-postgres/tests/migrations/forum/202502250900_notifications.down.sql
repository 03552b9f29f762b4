drop table forum.notifications;
