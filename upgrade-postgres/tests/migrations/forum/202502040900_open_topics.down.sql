drop view forum.open_topics;
