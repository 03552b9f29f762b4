drop type forum.badge_look;
