create table forum.events (id bigint generated always as identity primary key, at timestamptz not null default now(), payload jsonb) partition by list (id);
drop table forum.events;
create table forum.events (at timestamptz not null default '2026-01-01', kind text not null);
