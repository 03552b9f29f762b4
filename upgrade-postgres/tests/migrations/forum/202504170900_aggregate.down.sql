drop aggregate reports.longest(text);
drop function reports.longer(text, text);
