drop collation forum.plain;
