-- no-transaction
create index concurrently topics_slug on forum.topics (slug);

vacuum forum.topics;
