create table forum.audit_2026_q1 partition of forum.audit
    for values from ('2026-01-01 00:00+00') to ('2026-04-01 00:00+00');
