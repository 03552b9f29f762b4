drop index forum.one_open_report;
