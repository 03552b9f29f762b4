alter table forum.posts add column search tsvector generated always as (to_tsvector('simple', body)) stored;
