drop table forum.messages;
