drop table forum.uploads;
