drop function forum.log(text, jsonb);
