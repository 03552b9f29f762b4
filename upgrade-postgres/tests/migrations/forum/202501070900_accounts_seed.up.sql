insert into forum.accounts (name, email, trust) values
    ('Ann', 'ann@example.org', 'regular'),
    ('Bob', 'bob@example.org', 'basic'),
    ('Cy', 'cy@example.org', 'new');
