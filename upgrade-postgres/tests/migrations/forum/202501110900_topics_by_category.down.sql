drop index forum.topics_by_category;
