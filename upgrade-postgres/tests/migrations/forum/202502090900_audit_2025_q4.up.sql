create table forum.audit_2025_q4 partition of forum.audit
    for values from ('2025-10-01 00:00+00') to ('2026-01-01 00:00+00');
