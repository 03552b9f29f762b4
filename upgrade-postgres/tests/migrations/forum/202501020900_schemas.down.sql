drop schema reports;
drop schema forum;
