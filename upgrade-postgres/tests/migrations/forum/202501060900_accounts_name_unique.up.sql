create unique index accounts_name on forum.accounts (lower(name));
