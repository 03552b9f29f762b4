update customers set balance = balance - 7;
