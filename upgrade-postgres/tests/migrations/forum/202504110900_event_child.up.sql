create table forum.login_events (address inet not null) inherits (forum.events);
