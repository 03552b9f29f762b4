create table reports.hits (path text not null, count bigint not null default 0, primary key (path)) partition by hash (path);
create table reports.hits_0 partition of reports.hits for values with (modulus 4, remainder 0);
create table reports.hits_1 partition of reports.hits for values with (modulus 4, remainder 1);
create table reports.hits_2 partition of reports.hits for values with (modulus 4, remainder 2);
create table reports.hits_3 partition of reports.hits for values with (modulus 4, remainder 3);
