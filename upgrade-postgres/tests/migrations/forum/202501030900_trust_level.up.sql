create type forum.trust_level as enum ('new', 'basic', 'member', 'regular');
