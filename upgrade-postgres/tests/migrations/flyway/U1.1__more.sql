update stock set amount = amount - 5;
