create table forum.audit_2025_q2 partition of forum.audit
    for values from ('2025-04-01 00:00+00') to ('2025-07-01 00:00+00');
