alter table forum.messages enable row level security;
create policy own_messages on forum.messages using (
    sender::text = current_setting('forum.account', true) or recipient::text = current_setting('forum.account', true)
);
