//! A backfill against one UPDATE, and against a fixed setting beside pgbench, in one run.
//!
//! `cargo run --release -p upgrade-benches --bin backfill -- [--rows 5000000] [--rounds 3]
//! [--seconds 30] [--version 15|16|18] [--only free|governed]`
//!
//! The server is one of its own, with syncs on. Each round fills a fresh table, by one UPDATE and by
//! the step in turns; the median of the rounds' ratios counts. Beside pgbench (4 clients), stretches
//! without a backfill, with the fixed setting (200 rows a batch, 10,000 rows a second) and with the
//! governed one take turns.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use upgrade_benches::{Outcome, median, spread};
use upgrade_core::registry::{AnyTarget, BuildContext};
use upgrade_core::secret::SecretRef;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::testkit::TestContext;
use upgrade_postgres::steps::{Backfill, BackfillUndo};
use upgrade_postgres::{Database, DatabaseConfig};
use upgrade_testbed::postgres::{self, Server, Version};

/// What the command line says.
struct Arguments {
    rows: u64,
    rounds: usize,
    seconds: u64,
    version: Version,
    only: Option<String>,
}

fn arguments() -> Outcome<Arguments> {
    let mut found = Arguments { rows: 5_000_000, rounds: 3, seconds: 30, version: Version::V15, only: None };
    let mut rest = std::env::args().skip(1);
    while let Some(name) = rest.next() {
        let value = rest.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--rows" => found.rows = value.parse()?,
            "--rounds" => found.rounds = value.parse()?,
            "--seconds" => found.seconds = value.parse()?,
            "--only" => found.only = Some(value),
            "--version" => {
                let named = Version::ALL.into_iter().find(|version| version.to_string() == value);
                found.version = named.ok_or("there is 15, 16 and 18")?;
            }
            _ => return Err(format!("{name} is not known").into()),
        }
    }
    Ok(found)
}

fn main() -> Outcome<()> {
    let arguments = arguments()?;
    let settings = [
        ("shared_buffers", "1GB"),
        ("max_wal_size", "8GB"),
        ("checkpoint_timeout", "15min"),
        ("autovacuum", "off"),
        ("fsync", "on"),
    ];
    let server = postgres::own(arguments.version, &settings).ok_or("there is no such server")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let bench = Bench { server, arguments };
    runtime.block_on(bench.run())
}

struct Bench {
    server: Server,
    arguments: Arguments,
}

/// What filling a table once took.
#[derive(Clone, Copy)]
struct Filled {
    seconds: f64,
    /// The table, over what it was before.
    grown: f64,
    /// With its indexes.
    grown_in_all: f64,
    missed: i64,
}

/// What pgbench measured.
#[derive(Clone, Copy)]
struct Served {
    tps: f64,
    p95: f64,
}

impl Bench {
    async fn run(&self) -> Outcome<()> {
        let wanted = |part: &str| self.arguments.only.as_ref().is_none_or(|only| only == part);
        if wanted("free") {
            self.free().await?;
        }
        if wanted("governed") {
            self.governed().await?;
        }
        Ok(())
    }

    async fn connect(&self, database: &str) -> Outcome<PgConnection> {
        Ok(PgConnection::connect(&self.server.url(database)).await?)
    }

    async fn execute(&self, database: &str, sql: &str) -> Outcome<()> {
        let mut connection = self.connect(database).await?;
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connection).await?;
        connection.close().await?;
        Ok(())
    }

    async fn number(&self, database: &str, sql: &str) -> Outcome<i64> {
        let mut connection = self.connect(database).await?;
        let number = sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).fetch_one(&mut connection).await?;
        connection.close().await?;
        Ok(number)
    }

    async fn fresh_table(&self, database: &str) -> Outcome<()> {
        let rows = self.arguments.rows;
        self.execute(database, "drop table if exists people").await?;
        self.execute(
            database,
            &format!(
                "create table people (id bigint primary key, first text not null, last text not null, pad text not null, full_name text); \
                 insert into people select n, 'first' || n, 'last' || n, repeat('x', 150), null from generate_series(1, {rows}) n"
            ),
        )
        .await?;
        self.execute(database, "vacuum (freeze, analyze) people").await?;
        self.execute(database, "checkpoint").await
    }

    fn step(&self, database: &str, mut with: Value) -> Outcome<Backfill> {
        let directory = tempfile::tempdir()?;
        // A URL with a password is a secret, and a secret is a reference.
        let path: PathBuf = directory.keep().join("url");
        std::fs::write(&path, self.server.url(database))?;
        let reference = SecretRef::file(path.to_str().ok_or("the path is no text")?);
        let base = BuildContext::new("/");
        let target = Database::from_config(DatabaseConfig::new(reference), &base)?;
        with["target"] = "db".into();
        let cx = base.with_target("db", AnyTarget::new("postgres", target));
        Ok(Backfill::from_config(serde_json::from_value(with)?, &cx)?)
    }

    async fn prepared(&self, step: &Backfill, cx: &TestContext) -> Outcome<BackfillUndo> {
        match step.prepare(&cx.forward()).await? {
            Prepared::Change { undo, .. } => Ok(undo),
            other => Err(format!("nothing is to be done: {other:?}").into()),
        }
    }

    /// Fills the table by the step, or by one UPDATE.
    async fn fill(&self, database: &str, with: Option<Value>) -> Outcome<Filled> {
        self.fresh_table(database).await?;
        let table = "select pg_table_size('people')";
        let all = "select pg_total_relation_size('people')";
        let (before, before_in_all) = (self.number(database, table).await?, self.number(database, all).await?);
        let began = Instant::now();
        let seconds = match with {
            None => {
                let update = "update people set full_name = first || ' ' || last where full_name is null";
                self.execute(database, update).await?;
                began.elapsed().as_secs_f64()
            }
            Some(with) => {
                let step = self.step(database, with)?;
                let cx = TestContext::new("fill");
                let undo = self.prepared(&step, &cx).await?;
                step.apply(&cx.forward(), &undo).await?;
                let seconds = began.elapsed().as_secs_f64();
                step.commit(&cx.commit(), &undo).await?;
                seconds
            }
        };
        let ratio = |now: i64, before: i64| now as f64 / before as f64;
        Ok(Filled {
            seconds,
            grown: ratio(self.number(database, table).await?, before),
            grown_in_all: ratio(self.number(database, all).await?, before_in_all),
            missed: self
                .number(database, "select count(*) from people where full_name is distinct from first || ' ' || last")
                .await?,
        })
    }

    async fn free(&self) -> Outcome<()> {
        let arguments = &self.arguments;
        let database = self.server.database();
        let name = database.name();
        println!("filling {} rows, PostgreSQL {}, {} rounds", arguments.rows, arguments.version, arguments.rounds);
        let filling = || json!({ "table": "people", "set": { "full_name": "first || ' ' || last" }, "where": "full_name is null" });
        let variants = [
            ("one UPDATE", None),
            ("backfill", Some(filling())),
            ("  by one worker", Some(with(filling(), "workers", json!(1)))),
            ("  never vacuumed", Some(with(filling(), "vacuum", json!("0%")))),
            ("  values found kept", Some(json!({ "table": "people", "set": { "full_name": "first || ' ' || last" } }))),
        ];
        let mut rounds: Vec<Vec<Filled>> = Vec::new();
        for _ in 0..arguments.rounds {
            let mut round = Vec::new();
            for (_, with) in &variants {
                round.push(self.fill(name, with.clone()).await?);
            }
            rounds.push(round);
        }
        println!(
            "  {:22} {:>9} {:>24} {:>9} {:>9} {:>7}",
            "", "rows/s", "speed / one UPDATE", "table ×", "in all ×", "missed"
        );
        for (place, (what, _)) in variants.iter().enumerate() {
            let of = |figure: fn(&Filled) -> f64| median(rounds.iter().map(|round| figure(&round[place])).collect());
            let speed = spread(rounds.iter().map(|round| round[0].seconds / round[place].seconds).collect());
            let missed: i64 = rounds.iter().map(|round| round[place].missed).sum();
            println!(
                "  {what:22} {:9.0} {speed:>24} {:9.2} {:9.2} {missed:7}",
                arguments.rows as f64 / of(|filled| filled.seconds),
                of(|filled| filled.grown),
                of(|filled| filled.grown_in_all),
            );
        }
        println!("  targets: speed ≥ 1.1, table ≤ 1.35, 0 missed");
        Ok(())
    }

    /// Runs pgbench for some seconds, and leaves out its first two, in which caches fill.
    async fn serve(&self, database: &str, seconds: u64) -> Outcome<Served> {
        let directory = tempfile::tempdir()?;
        let log = directory.path().join("log");
        let mut command = Command::new(self.server.bin("pgbench"));
        command
            .args(["--client=4", "--jobs=2", "--no-vacuum", "--log", "--random-seed=7", "--builtin=tpcb-like"])
            .arg(format!("--time={seconds}"))
            .arg(format!("--log-prefix={}", log.display()))
            .arg(self.server.url(database))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let status = tokio::task::spawn_blocking(move || command.status()).await??;
        if !status.success() {
            return Err(format!("pgbench: {status}").into());
        }
        let (mut latencies, mut first) = (Vec::new(), None);
        for file in std::fs::read_dir(directory.path())? {
            for line in std::fs::read_to_string(file?.path())?.lines() {
                let fields: Vec<&str> = line.split(' ').collect();
                let [_, _, latency, _, second, ..] = fields.as_slice() else { continue };
                let second: u64 = second.parse()?;
                let begun = *first.get_or_insert(second);
                if second >= begun + 2 && second < begun + seconds {
                    latencies.push(latency.parse::<f64>()?);
                }
            }
        }
        latencies.sort_by(f64::total_cmp);
        let p95 = latencies.get(latencies.len() * 95 / 100).copied().ok_or("pgbench did nothing")?;
        Ok(Served { tps: latencies.len() as f64 / (seconds - 2) as f64, p95 })
    }

    async fn governed(&self) -> Outcome<()> {
        let arguments = &self.arguments;
        let database = self.server.database();
        let name = database.name();
        let status = Command::new(self.server.bin("pgbench"))
            .args(["--initialize", "--scale=20", "--quiet"])
            .arg(self.server.url(name))
            .stderr(Stdio::null())
            .stdout(Stdio::null())
            .status()?;
        if !status.success() {
            return Err(format!("pgbench --initialize: {status}").into());
        }
        let fixed = json!({ "table": "people", "set": { "full_name": "first || ' ' || last" }, "where": "full_name is null",
            "max_batch_rows": 200, "max_rows_per_second": 10_000, "workers": 1, "vacuum": "0%" });
        let governed = json!({ "table": "people", "set": { "full_name": "first || ' ' || last" }, "where": "full_name is null",
            "budget": { "max_increase": "10%", "lock_waits": 2,
                "probe": "select abalance from pgbench_accounts where aid = (select 1 + (random() * 1999999)::int)" } });
        println!("beside pgbench (4 clients), {} s a stretch, {} rounds", arguments.seconds, arguments.rounds);
        let mut rounds = Vec::new();
        for _ in 0..arguments.rounds {
            let alone = self.serve(name, arguments.seconds).await?;
            let (beside_fixed, fixed_rows) = self.beside(name, fixed.clone()).await?;
            let (beside, rows) = self.beside(name, governed.clone()).await?;
            rounds.push([(alone, 0.0), (beside_fixed, fixed_rows), (beside, rows)]);
        }
        // An idle server: how far each comes in ten seconds.
        let (idle_fixed, idle) = (self.idle(name, fixed).await?, self.idle(name, governed).await?);
        println!("  {:22} {:>24} {:>24} {:>9} {:>12}", "", "TPS ×", "p95 ×", "rows/s", "idle rows/s");
        for (place, (what, idle_rows)) in
            [("fixed 200 at 10k/s", idle_fixed), ("governed to 10 %", idle)].into_iter().enumerate()
        {
            let ratio = |figure: fn(&Served) -> f64| {
                spread(rounds.iter().map(|round| figure(&round[place + 1].0) / figure(&round[0].0)).collect())
            };
            let rows = median(rounds.iter().map(|round| round[place + 1].1).collect());
            println!(
                "  {what:22} {:>24} {:>24} {rows:9.0} {idle_rows:12.0}",
                ratio(|served| served.tps),
                ratio(|served| served.p95)
            );
        }
        println!("  idle, governed / fixed {:.2}", idle / idle_fixed);
        println!("  targets: TPS ≥ 0.95, p95 ≤ 1.10, idle ≥ 1.5");
        Ok(())
    }

    /// Serves beside a backfill, which began a little earlier, as its first seconds are a measurement.
    async fn beside(&self, database: &str, with: Value) -> Outcome<(Served, f64)> {
        self.fresh_table(database).await?;
        let step = Arc::new(self.step(database, with)?);
        let cx = TestContext::new("fill");
        let undo = self.prepared(&step, &cx).await?;
        let seconds = self.arguments.seconds;
        let filling = {
            let (step, cx, undo) = (step.clone(), cx.forward(), undo.clone());
            // It begins when the load is there to be measured.
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(500)).await;
                step.apply(&cx, &undo).await
            })
        };
        let served = self.serve(database, seconds).await?;
        let rows = self.number(database, "select count(*) from people where full_name is not null").await?;
        cx.cancellation().cancel();
        let _ = filling.await?;
        let mut cx = cx;
        cx.renew();
        step.settle(&cx.back(), &undo).await?;
        step.rollback(&cx.back(), &undo, None).await?;
        Ok((served, rows as f64 / seconds as f64))
    }

    async fn idle(&self, database: &str, with: Value) -> Outcome<f64> {
        self.fresh_table(database).await?;
        let step = Arc::new(self.step(database, with)?);
        let cx = TestContext::new("fill");
        let undo = self.prepared(&step, &cx).await?;
        let began = Instant::now();
        let filling = {
            let (step, cx, undo) = (step.clone(), cx.forward(), undo.clone());
            tokio::spawn(async move { step.apply(&cx, &undo).await })
        };
        while !filling.is_finished() && began.elapsed() < Duration::from_secs(30) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let seconds = began.elapsed().as_secs_f64();
        let rows = self.number(database, "select count(*) from people where full_name is not null").await?;
        cx.cancellation().cancel();
        let _ = filling.await?;
        let mut cx = cx;
        cx.renew();
        step.settle(&cx.back(), &undo).await?;
        step.rollback(&cx.back(), &undo, None).await?;
        Ok(rows as f64 / seconds)
    }
}

fn with(mut value: Value, key: &str, setting: Value) -> Value {
    value[key] = setting;
    value
}
