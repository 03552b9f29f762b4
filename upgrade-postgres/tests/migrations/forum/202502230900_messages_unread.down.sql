drop index forum.messages_unread;
