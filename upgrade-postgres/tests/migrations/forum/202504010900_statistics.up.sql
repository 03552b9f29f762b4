create statistics forum.topics_category_author (dependencies) on category, author from forum.topics;
analyze forum.topics;
