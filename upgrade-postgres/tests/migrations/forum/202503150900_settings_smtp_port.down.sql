update forum.settings set value = jsonb_set(value, '{port}', '25') where name = 'smtp';
