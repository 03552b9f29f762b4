create table forum.badges (
    id int generated always as identity primary key,
    title text not null unique,
    look forum.badge_look
);
insert into forum.badges (title, look) values ('First post', row('green', 'star')), ('Helper', row('blue', 'hand'));
