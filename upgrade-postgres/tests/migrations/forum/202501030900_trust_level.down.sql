drop type forum.trust_level;
