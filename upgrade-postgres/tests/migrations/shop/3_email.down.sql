alter table customers drop column email;
