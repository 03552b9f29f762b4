//! What the server's own statistics tell.

use sqlx::PgConnection;

use super::Figure;
use crate::error::{Doing, PostgresError};

/// What a user needs that is to see the sessions of others.
fn monitor(user: &str) -> String {
    format!("`grant pg_monitor to {user}`: without it the server hides what others do")
}

/// Measures connections, transactions, and those that are prepared.
pub(super) async fn of_sessions(connection: &mut PgConnection, user: &str) -> Result<Vec<Figure>, PostgresError> {
    type Row = (i64, f64, i64, Option<f64>, Option<String>, Option<f64>, Option<String>, i64, Option<String>);
    let (used, slots, hidden, longest, longest_of, idle, idle_of, prepared, prepared_of): Row = sqlx::query_as(
        "with others as (select a.*, \
             format('pid %s of %s%s', a.pid, a.usename, coalesce(' (' || nullif(a.application_name, '') || ')', '')) as who \
           from pg_stat_activity a where coalesce(a.backend_type, 'client backend') = 'client backend' \
             and a.usesysid is not null), \
         longest as (select extract(epoch from clock_timestamp() - xact_start)::float8 as age, who from others \
           where xact_start is not null and pid <> pg_backend_pid() order by xact_start limit 1), \
         idle as (select extract(epoch from clock_timestamp() - state_change)::float8 as age, who from others \
           where state like 'idle in transaction%' order by state_change limit 1) \
         select (select count(*) from others), \
           (select sum(case name when 'max_connections' then setting::int else -setting::int end)::float8 from pg_settings \
             where name in ('max_connections', 'superuser_reserved_connections', 'reserved_connections')), \
           (select count(*) from others where backend_start is null), \
           (select age from longest), (select who from longest), (select age from idle), (select who from idle), \
           (select count(*) from pg_prepared_xacts where database = current_database()), \
           (select string_agg(gid, ', ' order by prepared) from pg_prepared_xacts where database = current_database())",
    )
    .fetch_one(connection)
    .await
    .doing(|| "looking at the sessions".into())?;
    let mut figures = vec![
        Figure::new("connections", used as f64, None),
        Figure::new("connections_share", used as f64 / slots, None),
        Figure::new("prepared_transactions", prepared as f64, prepared_of),
    ];
    for (name, age, of) in [("longest_transaction_s", longest, longest_of), ("idle_in_transaction_s", idle, idle_of)] {
        // The oldest that is seen says nothing of those that are not.
        figures.push(match hidden {
            0 => Figure::new(name, age.unwrap_or(0.0), of),
            _ => Figure::hidden(name, monitor(user)),
        });
    }
    Ok(figures)
}

/// Measures how far standbys are behind, or this server if it is one, and what slots hold back.
pub(super) async fn of_replication(connection: &mut PgConnection, user: &str) -> Result<Vec<Figure>, PostgresError> {
    // A standby that has replayed nothing since it started is behind since then.
    type Row = (i64, i64, Option<f64>, Option<f64>, Option<String>, f64, f64);
    let (standbys, hidden, bytes, seconds, of, own_bytes, own_seconds): Row = sqlx::query_as(
        "with here as (select case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end as lsn), \
         standby as (select r.state is null as hidden, pg_wal_lsn_diff(here.lsn, r.replay_lsn)::float8 as bytes, \
             extract(epoch from r.replay_lag)::float8 as seconds, \
             format('%s%s', r.application_name, coalesce(' at ' || host(r.client_addr), '')) as who \
           from pg_stat_replication r, here) \
         select count(*), count(*) filter (where hidden), max(bytes), max(seconds), \
           (array_agg(who order by bytes desc nulls last))[1], \
           (select case when pg_is_in_recovery() then \
             coalesce(pg_wal_lsn_diff(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()), 0) else 0 end)::float8, \
           (select case when pg_is_in_recovery() \
               and pg_last_wal_receive_lsn() is distinct from pg_last_wal_replay_lsn() then \
             extract(epoch from clock_timestamp() \
               - coalesce(pg_last_xact_replay_timestamp(), pg_postmaster_start_time())) else 0 end)::float8 \
         from standby",
    )
    .fetch_one(&mut *connection)
    .await
    .doing(|| "looking at the replication".into())?;
    let (retained, slot): (Option<f64>, Option<String>) = sqlx::query_as(
        "select max(bytes), (array_agg(format('slot %s', slot_name) order by bytes desc nulls last))[1] from ( \
           select slot_name, pg_wal_lsn_diff(case when pg_is_in_recovery() then pg_last_wal_replay_lsn() \
             else pg_current_wal_lsn() end, restart_lsn)::float8 as bytes from pg_replication_slots) as slots",
    )
    .fetch_one(connection)
    .await
    .doing(|| "looking at the replication slots".into())?;
    let mut figures = vec![
        Figure::new("standbys", standbys as f64, None),
        Figure::new("replication_slot_bytes", retained.unwrap_or(0.0), slot),
    ];
    for (name, lag, own) in [("replication_lag_bytes", bytes, own_bytes), ("replication_lag_s", seconds, own_seconds)] {
        figures.push(match hidden {
            // A standby that has all of it reports no delay.
            0 => Figure::new(name, lag.unwrap_or(0.0).max(own), of.clone()),
            _ => Figure::hidden(name, monitor(user)),
        });
    }
    Ok(figures)
}

/// Measures what is wrong or worn in the database itself.
pub(super) async fn of_storage(connection: &mut PgConnection) -> Result<Vec<Figure>, PostgresError> {
    type Row = (f64, i64, Option<String>, i64, Option<String>);
    let (bytes, invalid, invalid_of, not_valid, not_valid_of): Row = sqlx::query_as(
        // One that is being built is not valid yet.
        "with invalid as (select i.indexrelid::regclass::text as name from pg_index i where not i.indisvalid \
             and not exists (select from pg_stat_progress_create_index p where p.index_relid = i.indexrelid) \
             and not exists (select from pg_class c where c.oid = i.indexrelid and c.relkind = 'I')), \
         unproven as (select format('%s of %s', k.conname, k.conrelid::regclass) as name from pg_constraint k \
           where not k.convalidated) \
         select pg_database_size(current_database())::float8, \
           (select count(*) from invalid), (select string_agg(name, ', ' order by name) from invalid), \
           (select count(*) from unproven), (select string_agg(name, ', ' order by name) from unproven)",
    )
    .fetch_one(&mut *connection)
    .await
    .doing(|| "looking at indexes and constraints".into())?;
    let (dead, dead_of): (Option<f64>, Option<String>) = sqlx::query_as(
        // The statistics of small tables say nothing.
        "select max(share), (array_agg(name order by share desc))[1] from ( \
           select relid::regclass::text as name, n_dead_tup::float8 / (n_live_tup + n_dead_tup) as share \
           from pg_stat_user_tables where n_live_tup + n_dead_tup >= 10000) as tables",
    )
    .fetch_one(&mut *connection)
    .await
    .doing(|| "looking at dead rows".into())?;
    let (age, age_of): (f64, String) = sqlx::query_as(
        "select greatest(age(datfrozenxid), mxid_age(datminmxid))::float8 / 2147483648, \
           format('database %s', datname) from pg_database order by 1 desc limit 1",
    )
    .fetch_one(connection)
    .await
    .doing(|| "looking at the age of transactions".into())?;
    Ok(vec![
        Figure::new("database_bytes", bytes, None),
        Figure::new("invalid_indexes", invalid as f64, invalid_of),
        Figure::new("not_valid_constraints", not_valid as f64, not_valid_of),
        Figure::new("dead_rows_share", dead.unwrap_or(0.0), dead_of),
        Figure::new("wraparound_share", age, Some(age_of)),
    ])
}
