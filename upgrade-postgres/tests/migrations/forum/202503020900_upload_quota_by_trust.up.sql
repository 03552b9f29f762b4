update forum.accounts set quota = quota * 2 where trust = 'regular';
