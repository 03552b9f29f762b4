create table reports.daily (
    day date primary key,
    posts int not null,
    accounts int not null
);
