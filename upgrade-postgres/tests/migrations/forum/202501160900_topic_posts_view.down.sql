drop view forum.topic_overview;
