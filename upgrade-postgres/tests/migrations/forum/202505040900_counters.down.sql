drop table forum.counters;
