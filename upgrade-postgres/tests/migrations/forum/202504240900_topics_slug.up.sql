alter table forum.topics add column slug text;
update forum.topics set slug = regexp_replace(lower(title), '[^a-z0-9]+', '-', 'g');
