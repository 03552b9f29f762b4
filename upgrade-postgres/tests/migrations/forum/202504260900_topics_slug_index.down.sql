-- no-transaction
drop index concurrently forum.topics_slug;
