create publication forum_posts for table forum.posts, forum.topics;
