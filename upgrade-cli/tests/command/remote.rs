//! A journal in a database: every command, a driver that is killed, a server that is away.

use upgrade_testbed::postgres::{Database, Server, USER, Version, own, shared};

use crate::world::World;

const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

fn url(database: &Database) -> String {
    format!("postgres://{USER}@127.0.0.1:{}/{}", database.port(), database.name())
}

fn world(server: &Server) -> (World, Database) {
    let database = server.database();
    let environment = [
        ("UPGRADE_JOURNAL", url(&database)),
        ("PGPASSWORD", upgrade_testbed::postgres::PASSWORD.to_owned()),
        ("UPGRADE_SEAL_KEY", KEY.to_owned()),
    ];
    let environment: Vec<_> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    (World::new().with(&environment), database)
}

#[test]
fn every_command_works_on_it() {
    let Some(server) = shared(Version::V15) else { return };
    let (world, database) = world(&server);
    world.pipeline("{ confirm_within: 1h }");
    for look in [&["history"][..], &["audit", "verify"], &["plan", "upgrade.yaml"]] {
        world.upgrade(look).exits(0);
    }
    world.upgrade(&["status"]).exits(2).says("there is no journal in postgres://").says("upgrade run FILE");
    assert_eq!(database.text("SELECT count(*) FROM pg_namespace WHERE nspname LIKE 'upgrade%'"), "0");
    world.upgrade(&["run", "upgrade.yaml", "--detach"]).exits(6);
    world.is_new();
    assert!(!world.path(".upgrade/runs").exists(), "the journal is in the database");
    world.upgrade(&["status"]).exits(0).says("probation until");
    world.upgrade(&["history"]).exits(0).says("notes");
    world.upgrade(&["audit", "verify"]).exits(0).says("whole");
    world.upgrade(&["run", "upgrade.yaml"]).exits(7);
    world.upgrade(&["rollback", "--reason", "tried"]).exits(0);
    world.is_old();
    world.upgrade(&["run", "upgrade.yaml", "--detach"]).exits(6);
    world.upgrade(&["stop"]).exits(0);
    world.upgrade(&["resume", "--detach"]).exits(6);
    world.upgrade(&["commit"]).exits(0);
    world.upgrade(&["watch", "--once"]).exits(0);
    world.is_new();
    let exported = world.upgrade(&["audit", "export"]).exits(0).objects();
    assert_eq!(database.text("SELECT count(*) FROM upgrade_journal.records"), exported.len().to_string());
    assert_eq!(database.text("SELECT count(*) FROM upgrade_journal.sealed"), "0", "found contents go at the end");
    database.execute("UPDATE upgrade_journal.records SET entry = entry || ' ' WHERE seq = 4");
    world.upgrade(&["audit", "verify"]).exits(1).says("line 5");
}

#[test]
fn a_driver_that_is_killed_is_resumed_by_another_from_another_directory() {
    let Some(server) = shared(Version::V16) else { return };
    let (world, database) = world(&server);
    world.pipeline("{ confirm_within: 1h }");
    let driver = world.start(&["run", "upgrade.yaml"]);
    let run = world.reaches("probation");
    world.upgrade(&["resume"]).exits(7);
    driver.signal("-KILL");
    assert_eq!(driver.ends(), None);
    // No file of the first driver is needed: what it kept is in the database.
    std::fs::remove_file(world.path("upgrade.yaml")).unwrap();
    std::fs::remove_dir_all(world.path(".upgrade")).unwrap();
    world.upgrade(&["status"]).exits(0).says("nobody watches it");
    world.upgrade(&["rollback", &run]).exits(0);
    world.is_old();
    assert_eq!(database.text("SELECT count(*) FROM upgrade_journal.leases"), "0");
}

#[test]
fn a_run_whose_server_stops_halts_is_read_from_the_copy_and_resumed() {
    let Some(server) = own(Version::V15, &[]) else { return };
    let (world, _database) = world(&server);
    world.write("slow.sh", "sleep 2; echo done > slow.txt\n");
    world.write(
        "upgrade.yaml",
        "upgrade: notes\nto: 1.1.0\nsteps:\n\
         - { id: kept, uses: host.file, with: { path: kept.txt, content: \"new\\n\" } }\n\
         - { id: slow, uses: host.command, with: { run: [sh, slow.sh], no_effect: true } }\n",
    );
    let driver = world.start(&["run", "upgrade.yaml"]);
    world.reaches("applying");
    let began = std::time::Instant::now();
    while world.read("kept.txt").as_deref() != Some("new\n") {
        assert!(began.elapsed().as_secs() < 20);
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    server.stop_immediate();
    assert_eq!(driver.ends(), Some(1), "the run halts");
    let away = world.upgrade(&["status"]).exits(0);
    assert!(away.stderr.contains("this is what this machine last saw of it"), "{away:?}");
    away.says("notes").says("kept");
    world.upgrade(&["history"]).exits(0).says("applying");
    world.upgrade(&["resume"]).exits(1).says("bring the server back");
    server.start();
    world.upgrade(&["resume"]).exits(0);
    assert_eq!((world.read("kept.txt").as_deref(), world.read("slow.txt").as_deref()), (Some("new\n"), Some("done\n")));
    world.upgrade(&["audit", "verify"]).exits(0).says("whole");
}

#[test]
fn a_password_on_the_command_line_is_refused_and_never_repeated() {
    let world = World::new();
    let ran = world.upgrade(&["--journal", "postgres://ann:hunter2@db/upgrades", "history"]).exits(2);
    assert!(!format!("{ran:?}").contains("hunter2"), "{ran:?}");
    ran.says("PGPASSWORD").says("UPGRADE_JOURNAL");
    for wrong in ["postgres://ann@db:port/x", "postgres://ann@db/x?lives_in=nowhere", "mysql://ann:hunter2@db/x"] {
        let ran = world.upgrade(&["--journal", wrong, "history"]).exits(2);
        assert!(!format!("{ran:?}").contains("hunter2") && ran.stderr.contains("hint"), "{ran:?}");
    }
    let unit = world.upgrade(&["--journal", "postgres://ann@db/x?schema=ops", "watch", "--unit"]).exits(0);
    assert!(unit.stdout.contains("--journal postgres://ann@db/x?schema=ops"), "{unit:?}");
    assert!(unit.stdout.contains("EnvironmentFile="), "{unit:?}");
}

#[test]
fn a_pipeline_that_changes_what_the_journal_lives_in_is_refused() {
    let Some(server) = shared(Version::V15) else { return };
    let (world, database) = world(&server);
    let service = |name: &str| {
        format!(
            "upgrade: notes\nto: 1.1.0\nsteps:\n\
             - {{ id: restart, uses: host.service, with: {{ unit: {name}, action: restart }} }}\n"
        )
    };
    world.write("upgrade.yaml", &service("postgresql.service"));
    let journal = format!("{}?lives_in=service:postgresql", url(&database));
    world
        .upgrade(&["--journal", &journal, "run", "upgrade.yaml"])
        .exits(7)
        .says("the journal lives in service:postgresql.service, which this pipeline changes");
    let target = format!("targets: {{ db: {{ uses: postgres, with: {{ url: \"{}\" }} }} }}\n", url(&database));
    let sql = "upgrade: notes\nto: 1.1.0\nsteps:\n\
               - { id: sql, uses: postgres.sql, with: { target: db, statement: SELECT 1, undo: SELECT 1 } }\n";
    world.write("upgrade.yaml", &format!("{target}{sql}"));
    world.upgrade(&["run", "upgrade.yaml"]).exits(7).says("which this pipeline changes (postgres:localhost:");
    // Another database of the same server is somebody else's.
    let other = server.database();
    world.write("upgrade.yaml", &format!("{target}{sql}").replace(database.name(), other.name()));
    world.upgrade(&["run", "upgrade.yaml"]).exits(0);
}
