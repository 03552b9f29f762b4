drop table forum.audit;
