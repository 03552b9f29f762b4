create table notes (
    id bigint generated always as identity primary key,
    text text not null,
    created timestamptz not null default now()
);
insert into notes (text) select 'note number ' || n from generate_series(1, 2000) n;
