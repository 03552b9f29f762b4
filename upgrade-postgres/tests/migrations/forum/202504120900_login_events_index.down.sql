drop index forum.login_events_address;
