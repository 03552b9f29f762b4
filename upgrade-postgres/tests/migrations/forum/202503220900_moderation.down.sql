drop table forum.reports;
