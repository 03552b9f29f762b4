create collation forum.plain (provider = libc, locale = 'C');
