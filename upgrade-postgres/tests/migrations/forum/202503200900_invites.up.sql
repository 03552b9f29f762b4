create sequence forum.invite_numbers start 1000;
create table forum.invites (
    number bigint primary key default nextval('forum.invite_numbers'),
    code text not null unique,
    invited_by bigint not null references forum.accounts
);
alter sequence forum.invite_numbers owned by forum.invites.number;
