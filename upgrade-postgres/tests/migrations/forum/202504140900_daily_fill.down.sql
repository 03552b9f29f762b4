delete from reports.daily;
