//! `postgres.backup` and `postgres.restore`: directories and databases that appear and go.

#![cfg(test)]

use serde_json::json;
use tempfile::TempDir;
use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::step::Step;
use upgrade_core::testkit::{Mutation, Scenario, Sweep, TestContext};
use upgrade_postgres::backup::manifest::Manifest;
use upgrade_testbed::postgres::{Database, Server, Version, own};

use crate::backup::{backup, listing, prepared, tools};
use crate::world::{registry, target_yaml};

const SETUP: &str = "create table notes (id int generated always as identity primary key, text text); \
    insert into notes (text) select 'note ' || n from generate_series(1, 50) n; create sequence tickets; \
    comment on table notes is 'kept'; select setval('tickets', 41);";

/// A database, and the directory of its backups.
struct World {
    database: Database,
    directory: TempDir,
}

struct Backups {
    server: Server,
    /// A backup of another time, for restores.
    earlier: Option<(TempDir, String)>,
    pipeline: &'static str,
}

impl Backups {
    fn on(version: Version, pipeline: &'static str, earlier: bool) -> Option<Self> {
        let server = own(version, &[("fsync", "off"), ("full_page_writes", "off")])?;
        let earlier = earlier.then(|| {
            let (database, directory) = (server.database(), tempfile::tempdir().unwrap());
            database.execute(SETUP);
            database.execute("update notes set text = 'earlier ' || id; create table more (a int)");
            let step =
                backup(&database, json!({ "to": directory.path(), "prove": "restore", "tools": tools(&server) }));
            let path = tokio::runtime::Runtime::new().unwrap().block_on(async {
                let test = TestContext::new("earlier");
                let undo = prepared(&step, &test.forward()).await.unwrap();
                step.apply(&test.forward(), &undo).await.unwrap().path
            });
            (directory, path.display().to_string())
        });
        Some(Self { server, earlier, pipeline })
    }

    fn databases(&self, database: &Database) -> Vec<String> {
        let names = database
            .text("select datname from pg_database where datname like '\\_upgrade%' or datname like 'foreign%'");
        names.lines().map(str::to_owned).collect()
    }
}

impl Scenario for Backups {
    type World = World;

    fn fresh(&self) -> World {
        let database = self.server.database();
        // What an operator left where it was stuck is no part of the next case.
        for name in self.databases(&database) {
            database.execute(&format!("drop database \"{name}\" with (force)"));
        }
        database.execute(SETUP);
        World { database, directory: tempfile::tempdir().unwrap() }
    }

    fn pipeline(&self, world: &World) -> Pipeline {
        let steps = self
            .pipeline
            .replace("{DIRECTORY}", &world.directory.path().join("backups").display().to_string())
            .replace("{EARLIER}", self.earlier.as_ref().map_or("", |(_, path)| path))
            .replace("{PROGRAMS}", &tools(&self.server).to_string());
        let document = format!("targets: {{ db: {} }}\n{steps}", target_yaml(&world.database.url()));
        parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry())
            .unwrap_or_else(|error| panic!("{error}"))
    }

    fn observe(&self, world: &World) -> String {
        let cx = TestContext::new("observer").forward();
        let at = world.directory.path().join("backups");
        let backups = listing(&at).into_iter().map(|name| match Manifest::read(&at.join(&name)) {
            Ok(manifest) => match manifest.verify(&at.join(&name), &cx) {
                Ok(()) if !name.starts_with('.') => format!("a backup of {} tables", manifest.tables.len()),
                _ => format!("half a backup: {name}"),
            },
            Err(_) => name,
        });
        format!(
            "{}\n{}\n{}\n{:?}\n{:?}",
            world.database.schema(),
            world.database.contents(),
            world.database.text("select last_value from tickets"),
            self.databases(&world.database),
            backups.collect::<Vec<_>>()
        )
    }

    fn interfere(&self, world: &World, step: &StepId) -> bool {
        if step.as_str() != "exchanged" {
            return false;
        }
        // Somebody else puts a database of their own in its place.
        let (name, other) = (world.database.name(), self.server.database());
        other.execute(&format!(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'; \
             alter database {name} rename to foreign_{name};"
        ));
        other.execute(&format!("create database {name}"));
        world.database.execute("create table theirs (a int)");
        true
    }

    fn survived(&self, world: &World, _step: &StepId) -> bool {
        world.database.text("select to_regclass('theirs')") == "theirs"
    }
}

const KEPT: &str = r#"
upgrade: kept
steps:
  - id: keep
    uses: postgres.backup
    with: { target: db, to: {DIRECTORY}, jobs: 1, tools: {PROGRAMS} }
"#;

const EXCHANGED: &str = r#"
upgrade: exchanged
steps:
  - id: exchanged
    uses: postgres.restore
    with: { target: db, backup: {EARLIER}, analyze: false, tools: {PROGRAMS} }
"#;

const THERE_AND_BACK: &str = r#"
upgrade: there-and-back
steps:
  - id: keep
    uses: postgres.backup
    with: { target: db, to: {DIRECTORY}, prove: restore, tools: {PROGRAMS} }
  - id: spoil
    uses: postgres.sql
    with:
      target: db
      statement: update notes set text = 'spoilt' where id = 7
      undo: update notes set text = 'note 7' where id = 7
  - id: again
    uses: postgres.restore
    with: { target: db, backup: "${steps.keep.output.path}", sha256: "${steps.keep.output.sha256}", analyze: false, tools: {PROGRAMS} }
"#;

fn sweep(version: Version, pipeline: &'static str, earlier: bool, every: u64, at_least: usize) {
    let Some(backups) = Backups::on(version, pipeline, earlier) else { return };
    let report = Sweep::new(&backups).every(every).run().unwrap_or_else(|failure| panic!("{failure}"));
    println!("PostgreSQL {version}: {report:?}");
    assert!(report.cases >= at_least, "{report:?}");
}

#[test]
fn a_backup_is_there_whole_or_not_at_all() {
    sweep(Version::V15, KEPT, false, 4, 25);
}

#[test]
fn a_database_is_exchanged_or_as_it_was() {
    sweep(Version::V15, EXCHANGED, true, 4, 25);
}

#[test]
#[ignore = "minutes: scripts/test --full"]
fn campaign_there_and_back() {
    sweep(Version::V15, THERE_AND_BACK, false, 1, 100);
    sweep(Version::V18, THERE_AND_BACK, false, 9, 30);
    sweep(Version::V18, KEPT, false, 1, 50);
    sweep(Version::V18, EXCHANGED, true, 1, 50);
}

#[test]
fn every_seeded_defect_is_noticed() {
    let Some(backups) = Backups::on(Version::V15, THERE_AND_BACK, false) else { return };
    for mutation in Mutation::ALL {
        let failure = Sweep::new(&backups).with_mutation(mutation).run();
        let failure = failure.expect_err(&format!("{mutation:?} was not noticed"));
        println!("{mutation:?}: {failure}");
    }
}
