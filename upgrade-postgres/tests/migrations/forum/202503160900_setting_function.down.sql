drop function forum.setting(text);
