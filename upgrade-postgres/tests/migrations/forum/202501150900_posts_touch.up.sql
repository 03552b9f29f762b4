create trigger touch before update of body on forum.posts for each row execute function forum.touch();
