drop publication forum_posts;
