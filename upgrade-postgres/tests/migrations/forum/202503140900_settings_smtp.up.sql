insert into forum.settings values ('smtp', '{"host": "localhost", "port": 25}');
