drop function forum.touch();
