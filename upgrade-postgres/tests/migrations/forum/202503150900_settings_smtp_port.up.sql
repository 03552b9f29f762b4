update forum.settings set value = jsonb_set(value, '{port}', '587') where name = 'smtp';
