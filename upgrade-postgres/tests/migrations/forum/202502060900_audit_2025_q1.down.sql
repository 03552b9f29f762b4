drop table forum.audit_2025_q1;
