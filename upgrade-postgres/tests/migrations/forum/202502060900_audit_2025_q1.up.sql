create table forum.audit_2025_q1 partition of forum.audit
    for values from ('2025-01-01 00:00+00') to ('2025-04-01 00:00+00');
