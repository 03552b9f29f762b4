drop table forum.settings;
