drop trigger audit on forum.posts;
drop function forum.audit_posts();
