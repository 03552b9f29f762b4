drop table forum.login_events;
