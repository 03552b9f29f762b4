drop materialized view reports.best_posts;
