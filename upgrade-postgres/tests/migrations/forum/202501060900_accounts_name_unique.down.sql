drop index forum.accounts_name;
