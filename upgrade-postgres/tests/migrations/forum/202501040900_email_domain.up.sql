create domain forum.email as text check (value ~ '^[^@\s]+@[^@\s]+$');
