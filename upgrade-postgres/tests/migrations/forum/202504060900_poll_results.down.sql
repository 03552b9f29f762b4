drop view reports.poll_results;
