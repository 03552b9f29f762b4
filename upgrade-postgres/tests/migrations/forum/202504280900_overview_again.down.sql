drop view forum.topic_overview;
create view forum.topic_overview as
select t.id, t.title, count(p.id) as posts, max(p.created_at) as last_post
from forum.topics t left join forum.posts p on p.topic = t.id
group by t.id;
