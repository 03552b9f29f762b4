create materialized view reports.best_posts as
select id, topic, score from forum.posts where score > 0;
create unique index best_posts_id on reports.best_posts (id);
