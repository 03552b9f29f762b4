drop table reports.daily;
