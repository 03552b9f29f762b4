create index bans_during on forum.bans using gist (during);
