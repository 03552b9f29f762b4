drop function forum.find(text);
