insert into reports.hits select '/topic/' || n, n from generate_series(1, 50) n;
