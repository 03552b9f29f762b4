create table audit (at int generated always as identity, what text not null);
create function note() returns trigger language plpgsql as $$
begin
  insert into audit (what) values (tg_table_name || ' ' || tg_op);
  return new;
end
$$;
create trigger audited after insert or update on customers for each row execute function note();
