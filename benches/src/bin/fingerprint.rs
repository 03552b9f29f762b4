//! The fingerprint of a table's contents against `SELECT sum(hashtext(t::text))`, in one run.
//!
//! `cargo run --release -p upgrade-benches --bin fingerprint [ROWS]`
//!
//! Both are asked of one server with its default settings, in turns; the first round warms up. The
//! work is the server's own: how this program was built does not show.

use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use upgrade_benches::{Outcome, median, spread};
use upgrade_postgres::fingerprint::table_fingerprint;
use upgrade_testbed::postgres::{Version, own};

const ROUNDS: usize = 7;
const ROWS: u64 = 5_000_000;

fn main() -> Outcome<()> {
    let rows = std::env::args().nth(1).map_or(Ok(ROWS), |text| text.parse())?;
    // Version 18 counts the parallel workers that it starts.
    let settings = [("fsync", "off"), ("max_wal_size", "8GB"), ("shared_buffers", "1GB")];
    let server = own(Version::V18, &settings).ok_or("there is no PostgreSQL 18")?;
    let database = server.database();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(compare(&database.url(), rows))
}

async fn compare(url: &str, rows: u64) -> Outcome<()> {
    let mut connection = PgConnection::connect(url).await?;
    let make = format!(
        "create table t as select n as id, 'user ' || n as name, (n * 37 % 1000)::numeric / 100 as price, \
           timestamptz '2026-01-01 00:00Z' + n * interval '1 s' as at, \
           case when n % 3 = 0 then null else md5(n::text) end as note from generate_series(1, {rows}) as n"
    );
    sqlx::raw_sql(AssertSqlSafe(make)).execute(&mut connection).await?;
    sqlx::raw_sql("vacuum analyze t").execute(&mut connection).await?;
    let size: String =
        sqlx::query_scalar("select pg_size_pretty(pg_table_size('t'))").fetch_one(&mut connection).await?;
    println!("contents of {rows} rows, {size} ({ROUNDS} rounds)");

    let table = "t".parse()?;
    let (mut times, mut workers) = (Vec::new(), [0, 0]);
    for round in 0..=ROUNDS {
        let before = launched(&mut connection).await?;
        let start = Instant::now();
        sqlx::raw_sql("select sum(hashtext(t::text)) from t").execute(&mut connection).await?;
        let plain = start.elapsed();
        let between = launched(&mut connection).await?;
        let start = Instant::now();
        let read = table_fingerprint(&mut connection, &table, &[]).await?;
        let ours = start.elapsed();
        workers = [between - before, launched(&mut connection).await? - between];
        if read.rows.cast_unsigned() != rows {
            return Err(format!("{} rows were read", read.rows).into());
        }
        if round > 0 {
            times.push((plain, ours));
        }
    }
    let seconds = |pick: fn(&(Duration, Duration)) -> Duration| {
        median(times.iter().map(|time| pick(time).as_secs_f64()).collect())
    };
    println!("  sum(hashtext(t::text))   {:7.3} s   {} parallel workers", seconds(|time| time.0), workers[0]);
    println!("  fingerprint              {:7.3} s   {} parallel workers", seconds(|time| time.1), workers[1]);
    let ratio = times.iter().map(|(plain, ours)| ours.as_secs_f64() / plain.as_secs_f64()).collect();
    println!("  fingerprint / sum        {} ×   (target ≤ 1.2)", spread(ratio));
    Ok(())
}

/// Counts the parallel workers that were started for the database so far.
async fn launched(connection: &mut PgConnection) -> Outcome<i64> {
    sqlx::raw_sql("select pg_stat_force_next_flush()").execute(&mut *connection).await?;
    let count = "select parallel_workers_launched from pg_stat_database where datname = current_database()";
    Ok(sqlx::query_scalar(count).fetch_one(connection).await?)
}
