drop table forum.events;
