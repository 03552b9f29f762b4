drop materialized view reports.tag_cloud;
