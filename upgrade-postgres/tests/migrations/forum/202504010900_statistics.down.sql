drop statistics forum.topics_category_author;
