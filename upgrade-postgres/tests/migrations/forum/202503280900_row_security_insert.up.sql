create policy send_messages on forum.messages for insert with check (sender::text = current_setting('forum.account', true));
