drop table forum.badges;
