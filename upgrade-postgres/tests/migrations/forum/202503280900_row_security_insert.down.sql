drop policy send_messages on forum.messages;
