truncate reports.hits;
