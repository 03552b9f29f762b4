create table forum.audit_2025_q3 partition of forum.audit
    for values from ('2025-07-01 00:00+00') to ('2025-10-01 00:00+00');
