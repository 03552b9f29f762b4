create index messages_unread on forum.messages (recipient) where read_at is null;
