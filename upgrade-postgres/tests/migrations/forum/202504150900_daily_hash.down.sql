drop table reports.hits;
