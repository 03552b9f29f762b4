//! `postgres.backup` against `pg_dump | gzip`, in one run, on a database that pgbench made.
//!
//! `cargo run --release -p upgrade-benches --bin backup [SCALE [VERSION [ROUNDS [LEVEL]]]]`
//!
//! The two take turns on one server, each with its files on the same disk, and the median of the
//! rounds' ratios counts. Ours includes what the step does beside dumping: digests read back, the
//! listing by pg_restore, everything made durable. A last backup is proven by a restore.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use upgrade_benches::{Outcome, spread};
use upgrade_core::registry::{AnyTarget, BuildContext};
use upgrade_core::secret::SecretRef;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_postgres::steps::Backup;
use upgrade_postgres::{Database, DatabaseConfig};
use upgrade_testbed::postgres::{self, Server, Version};

fn main() -> Outcome<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let scale: u32 = arguments.first().map_or(Ok(50), |text| text.parse())?;
    let version = match arguments.get(1).map(String::as_str) {
        None | Some("15") => Version::V15,
        Some("16") => Version::V16,
        Some("18") => Version::V18,
        Some(other) => return Err(format!("there is no server of version {other} here: 15, 16 or 18").into()),
    };
    let rounds: usize = arguments.get(2).map_or(Ok(3), |text| text.parse())?;
    let level: u8 = arguments.get(3).map_or(Ok(3), |text| text.parse())?;
    let settings = [("shared_buffers", "512MB"), ("max_wal_size", "4GB"), ("fsync", "off")];
    let server = postgres::own(version, &settings).ok_or("there are no programs of that version")?;
    let database = server.database();
    let made = program(&server, "pgbench", database.name()).args(["-i", "-q", "-s", &scale.to_string()]).output()?;
    if !made.status.success() {
        return Err(String::from_utf8_lossy(&made.stderr).into_owned().into());
    }
    database.execute("vacuum analyze");
    let size: f64 = database.text("select pg_database_size(current_database())").parse()?;
    println!("pgbench -s {scale} on PostgreSQL {version}: {:.0} MB, {rounds} rounds", size / 1e6);
    compare(&server, &database, rounds, level)?;
    // Rows of pgbench are mostly blanks, which gzip is as good as done with: what users keep is not.
    database.execute("drop table pgbench_accounts, pgbench_branches, pgbench_history, pgbench_tellers");
    database.execute(&ORDERS.replace("ROWS", &(u64::from(scale) * 60_000).to_string()));
    database.execute("vacuum analyze");
    let size: f64 = database.text("select pg_database_size(current_database())").parse()?;
    println!("orders on PostgreSQL {version}: {:.0} MB, {rounds} rounds", size / 1e6);
    compare(&server, &database, rounds, level)
}

/// Rows as an application keeps them: keys, names, amounts, times, a document.
const ORDERS: &str = "
    create table orders (id bigint primary key, customer uuid, email text, status text, amount numeric(10,2),
        placed timestamptz, note text, lines jsonb);
    insert into orders select n, md5(n::text)::uuid, 'person' || n * 7919 % 1000003 || '@example.com',
        (array['new','paid','packed','shipped','returned'])[1 + n % 5], (n * 31 % 100000)::numeric / 100,
        '2024-01-01'::timestamptz + n * interval '7 s', 'leave it with ' || left(md5((n * 3)::text), 12),
        jsonb_build_array(jsonb_build_object('sku', left(md5((n % 5000)::text), 8), 'count', n % 9))
    from generate_series(1::bigint, ROWS) n;
    create index on orders (customer);
";

/// Lets the two take turns.
fn compare(server: &Server, database: &postgres::Database, rounds: usize, level: u8) -> Outcome<()> {
    let home = tempfile::tempdir()?;
    let (mut ratios, mut sizes) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let (theirs, their_bytes) = piped(server, database.name(), home.path())?;
        let (ours, our_bytes) = step(server, &database.url(), home.path(), "list", level)?;
        println!(
            "  pg_dump | gzip {:6.2} s {:8.1} MB    postgres.backup {:6.2} s {:8.1} MB",
            theirs.as_secs_f64(),
            their_bytes as f64 / 1e6,
            ours.as_secs_f64(),
            our_bytes as f64 / 1e6
        );
        ratios.push(theirs.as_secs_f64() / ours.as_secs_f64());
        sizes.push(our_bytes as f64 / their_bytes as f64);
    }
    println!("times as fast  {}", spread(ratios));
    println!("size           {}", spread(sizes));
    let (proven, _) = step(server, &database.url(), home.path(), "restore", level)?;
    println!("proven by a restore: {:.2} s", proven.as_secs_f64());
    Ok(())
}

/// A program of the server's version, led to a database.
fn program(server: &Server, name: &str, database: &str) -> Command {
    let mut command = Command::new(server.bin(name));
    command
        .env("PGHOST", server.host())
        .env("PGPORT", server.port().to_string())
        .env("PGUSER", postgres::USER)
        .env("PGPASSWORD", postgres::PASSWORD)
        .env("PGDATABASE", database);
    command
}

fn piped(server: &Server, database: &str, home: &Path) -> Outcome<(Duration, u64)> {
    let to = home.join("dump.sql.gz");
    let began = Instant::now();
    let mut dump = program(server, "pg_dump", database).stdout(Stdio::piped()).spawn()?;
    let stdout = dump.stdout.take().ok_or("pg_dump has no output")?;
    let gzip = Command::new("gzip").stdin(stdout).stdout(File::create(&to)?).status()?;
    if !dump.wait()?.success() || !gzip.success() {
        return Err("pg_dump | gzip failed".into());
    }
    let took = began.elapsed();
    let bytes = fs::metadata(&to)?.len();
    fs::remove_file(to)?;
    Ok((took, bytes))
}

fn step(server: &Server, url: &str, home: &Path, prove: &str, level: u8) -> Outcome<(Duration, u64)> {
    let secret = home.join("url");
    fs::write(&secret, url)?;
    let reference = SecretRef::file(secret.to_str().ok_or("the path is not UTF-8")?);
    let cx = BuildContext::new(home);
    let target = Database::from_config(DatabaseConfig::new(reference), &cx)?;
    let cx = cx.with_target("db", AnyTarget::new("postgres", target));
    let tools = json!({ "pg_dump": server.bin("pg_dump"), "pg_restore": server.bin("pg_restore") });
    let config = json!({ "target": "db", "to": "backups", "prove": prove, "level": level, "tools": tools });
    let step = Backup::from_config(serde_json::from_value(config)?, &cx)?;
    let test = TestContext::new("bench");
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let began = Instant::now();
        let Prepared::Change { undo, .. } = step.prepare(&test.forward()).await? else {
            return Err("a backup always has something to do".into());
        };
        let output = step.apply(&test.forward(), &undo).await?;
        let took = began.elapsed();
        step.rollback(&test.back(), &undo, Some(&output)).await?;
        Ok((took, output.bytes))
    })
}
