drop table forum.audit_2026_q2;
