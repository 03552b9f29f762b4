drop domain forum.email;
