create schema forum;
create schema reports;
