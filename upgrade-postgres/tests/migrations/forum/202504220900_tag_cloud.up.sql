create materialized view reports.tag_cloud as
select g.label, count(*) as topics from forum.tags g join forum.topic_tags t on t.tag = g.id group by g.label;
