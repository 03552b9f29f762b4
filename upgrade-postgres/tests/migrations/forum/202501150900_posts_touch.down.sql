drop trigger touch on forum.posts;
