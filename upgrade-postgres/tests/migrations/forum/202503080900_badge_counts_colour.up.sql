create or replace view reports.badge_counts as
select b.title, count(*) as given, (min(b.look::text)::forum.badge_look).colour as colour
from forum.badges b join forum.account_badges g on g.badge = b.id group by b.title;
