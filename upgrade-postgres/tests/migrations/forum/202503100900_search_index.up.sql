-- no-transaction
create index concurrently posts_search on forum.posts using gin (search);
