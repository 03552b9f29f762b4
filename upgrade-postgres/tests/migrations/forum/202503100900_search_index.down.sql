-- no-transaction
drop index concurrently forum.posts_search;
