drop view reports.badge_counts;
