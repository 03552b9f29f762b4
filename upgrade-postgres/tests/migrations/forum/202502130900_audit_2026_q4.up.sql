create table forum.audit_2026_q4 partition of forum.audit
    for values from ('2026-10-01 00:00+00') to ('2027-01-01 00:00+00');
