insert into reports.daily
select '2026-01-01', (select count(*) from forum.posts), (select count(*) from forum.accounts);
