drop view forum.open_flags;
