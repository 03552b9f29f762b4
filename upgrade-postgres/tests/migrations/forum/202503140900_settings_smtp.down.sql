delete from forum.settings where name = 'smtp';
