create index topics_by_category on forum.topics (category, created_at desc);
