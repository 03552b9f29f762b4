create table forum.audit_2026_q3 partition of forum.audit
    for values from ('2026-07-01 00:00+00') to ('2026-10-01 00:00+00');
