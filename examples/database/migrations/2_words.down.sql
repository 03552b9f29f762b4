alter table notes drop column words;
