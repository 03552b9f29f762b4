drop operator forum.=~= (text, text);
drop function forum.same_name(text, text);
