create or replace view forum.topic_overview as
select t.id, t.title, count(p.id) as posts, max(p.created_at) as last_post, sum(p.score) as score
from forum.topics t left join forum.posts p on p.topic = t.id
group by t.id;
