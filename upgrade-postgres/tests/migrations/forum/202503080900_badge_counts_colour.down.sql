drop view reports.badge_counts;
create view reports.badge_counts as
select b.title, count(*) as given from forum.badges b join forum.account_badges g on g.badge = b.id group by b.title;
