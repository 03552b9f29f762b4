comment on schema reports is null;
comment on column forum.topics.slug is null;
