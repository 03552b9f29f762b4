create index login_events_address on forum.login_events (address inet_ops);
