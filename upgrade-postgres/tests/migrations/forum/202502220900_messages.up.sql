create table forum.messages (
    id bigint generated always as identity primary key,
    sender bigint not null references forum.accounts,
    recipient bigint not null references forum.accounts,
    body text not null,
    read_at timestamptz,
    constraint not_to_oneself check (sender <> recipient)
);
