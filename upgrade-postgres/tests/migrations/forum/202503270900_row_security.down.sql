drop policy own_messages on forum.messages;
alter table forum.messages disable row level security;
