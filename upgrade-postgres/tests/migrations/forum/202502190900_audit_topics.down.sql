drop trigger audit on forum.topics;
drop function forum.audit_topics();
