delete from forum.messages;
