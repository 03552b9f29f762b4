create type forum.badge_look as (colour text, icon text);
