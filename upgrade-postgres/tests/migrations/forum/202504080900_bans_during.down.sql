drop index forum.bans_during;
