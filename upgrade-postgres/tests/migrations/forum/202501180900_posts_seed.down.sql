delete from forum.posts;
