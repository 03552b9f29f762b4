comment on column forum.topics.slug is 'What the address ends in.';
comment on schema reports is 'What can be computed again.';
