create table forum.audit_2026_q2 partition of forum.audit
    for values from ('2026-04-01 00:00+00') to ('2026-07-01 00:00+00');
