//! What keeps a session from being opened: each case says what is wrong and what to do, shows no
//! secret, and changes nothing.

#![cfg(test)]

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::{Connection, PgConnection};
use upgrade_core::error::{Class, StepError};
use upgrade_core::executor::{Executor, Interrupt, RunOptions};
use upgrade_core::file::{LoadOptions, parse};
use upgrade_core::journal::MemoryJournal;
use upgrade_core::registry::BuildContext;
use upgrade_core::secret::SecretRef;
use upgrade_core::target::Target;
use upgrade_core::testkit::TestContext;
use upgrade_postgres::{Database, DatabaseConfig};
use upgrade_testbed::pgbouncer::{self, Mode};
use upgrade_testbed::postgres::{self, Server, Version, own, shared};

use crate::world::{any_database, registry, target, target_with, target_yaml};

const PASSWORD: &str = postgres::PASSWORD;

/// Asks for an error, and that it holds no password.
async fn refused(database: &Database) -> StepError {
    let cx = TestContext::new("step").forward();
    let error = database.connect(&cx).await.expect_err("no session is to be had");
    assert!(!format!("{error:?}").contains(PASSWORD) && !format!("{error:?}").contains("wrong-one"), "{error:?}");
    error
}

#[track_caller]
fn says(error: &StepError, class: Class, message: &str, hint: &str) {
    assert_eq!(error.class(), class, "{error:?}");
    let said = format!("{} {}", error.message(), error.causes().join(" "));
    assert!(said.contains(message), "{message}: {error:?}");
    assert!(error.hint().unwrap_or_default().contains(hint), "{hint}: {error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_place_or_person_is_told_with_the_remedy() {
    let Some(database) = any_database() else { return };
    let url = database.url();
    let wrong = refused(&target(&url.replace(PASSWORD, "wrong-one"))).await;
    says(
        &wrong,
        Class::Permanent,
        "password authentication failed for user \"tester\"",
        "check the user and the password",
    );
    let nobody = refused(&target(&url.replace("tester:", "nobody-here:"))).await;
    says(&nobody, Class::Permanent, "password authentication failed", "check the user and the password");
    let nowhere = refused(&target(&url.replace(database.name(), "no_such_database"))).await;
    says(&nowhere, Class::Permanent, "\"no_such_database\" does not exist", "check the database's name");
    let host = refused(&target(&url.replace("127.0.0.1", "no-such-host.invalid"))).await;
    says(&host, Class::Transient, "connecting to database", "host and port");
    let port = refused(&target(&url.replace(&format!(":{}/", database.port()), ":1/"))).await;
    says(&port, Class::Transient, "Connection refused", "check that the server runs");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_answer_is_not_waited_for_longer_than_said() {
    let Some(database) = any_database() else { return };
    let mute = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = mute.local_addr().unwrap().port();
    let url = database.url().replace(&format!(":{}/", database.port()), &format!(":{port}/"));
    let db = target_with(&url, |config| config.connect_timeout = Some("400ms".parse().unwrap()));
    let began = Instant::now();
    let error = refused(&db).await;
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    says(&error, Class::Transient, "took longer than 400ms", "connect_timeout");

    // Nor when the call is cancelled meanwhile.
    let test = TestContext::new("step");
    let (db, cx) = (target(&url), test.forward());
    let connecting = tokio::spawn(async move { db.connect(&cx).await.map(drop) });
    tokio::time::sleep(Duration::from_millis(100)).await;
    test.cancellation().cancel();
    let began = Instant::now();
    says(&connecting.await.unwrap().unwrap_err(), Class::Transient, "cancelled", "upgrade resume");
    assert!(began.elapsed() < Duration::from_secs(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_with_a_wrong_password_ends_before_anything_is_changed() {
    let Some(database) = any_database() else { return };
    let other = any_database().unwrap();
    let document = format!(
        "upgrade: two\ntargets: {{ right: {}, wrong: {} }}\nsteps:\n\
         - {{ id: first, uses: postgres.sql, with: {{ target: right, statement: create table made (n int), undo: drop table made }} }}\n\
         - {{ id: second, uses: postgres.sql, with: {{ target: wrong, statement: create table made (n int), undo: drop table made }} }}\n",
        target_yaml(&database.url()),
        target_yaml(&other.url().replace(PASSWORD, "wrong-one")),
    );
    let pipeline =
        parse(&document, "pipeline.yaml".as_ref(), "/".as_ref(), &LoadOptions::default(), &registry()).unwrap();
    let executor = Executor::new(Arc::new(MemoryJournal::new()));
    let before = database.schema();
    let ended = executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await;
    let said = format!("{ended:?}");
    assert!(
        said.contains("password authentication failed") && said.contains("check the user and the password"),
        "{said}"
    );
    assert!(!said.contains("wrong-one"), "{said}");
    assert_eq!(database.schema(), before);
    assert_eq!(database.text("select count(*) from pg_namespace where nspname = '_upgrade'"), "0");
}

#[test]
fn a_password_in_the_pipeline_is_refused() {
    for url in ["postgres://ann:hunter2@db/orders", "postgres://ann@db/orders?password=hunter2"] {
        let error = Database::from_config(DatabaseConfig::new(url), &BuildContext::new("/")).unwrap_err();
        assert_eq!(error.key.as_deref(), Some("url"));
        assert!(error.message.contains("password as plain text"), "{error:?}");
        assert!(error.hint.as_deref().unwrap().contains("password: { env:"), "{error:?}");
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    }
    for wrong in ["", "orders", "mysql://db/orders", "postgres://db:port/orders"] {
        let error = Database::from_config(DatabaseConfig::new(wrong), &BuildContext::new("/")).unwrap_err();
        assert!(error.hint.as_deref().unwrap().contains("postgres://USER@HOST:PORT/DATABASE"), "{error:?}");
    }
}

/// Reads a password in a process of its own, as the environment is the process's.
#[tokio::test(flavor = "multi_thread")]
async fn the_password_comes_from_where_it_is_named_or_from_where_psql_has_it() {
    let Some(database) = any_database() else { return };
    if let Ok(url) = std::env::var("UPGRADE_TEST_PASSWORD_URL") {
        let reference = std::env::var("UPGRADE_TEST_PASSWORD").is_ok().then(|| SecretRef::env("UPGRADE_TEST_PASSWORD"));
        let config = DatabaseConfig { password: reference, ..DatabaseConfig::new(url) };
        let db = Database::from_config(config, &BuildContext::new("/")).unwrap();
        db.connect(&TestContext::new("step").forward()).await.unwrap();
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let url = database.url().replace(&format!(":{PASSWORD}@"), "@");
    let connects = |name: &str, value: &str| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "connection::the_password_comes_from_where_it_is_named_or_from_where_psql_has_it"])
            .env_remove("PGPASSWORD")
            .env("HOME", home.path())
            .env("UPGRADE_TEST_PASSWORD_URL", &url)
            .env(name, value);
        command.output().unwrap().status.success()
    };
    assert!(connects("UPGRADE_TEST_PASSWORD", PASSWORD));
    assert!(!connects("UPGRADE_TEST_PASSWORD", "wrong-one"));
    assert!(connects("PGPASSWORD", PASSWORD));
    assert!(!connects("PGPASSWORD", "wrong-one"));
    assert!(!connects("NOTHING", "at all"));
    let file = home.path().join(".pgpass");
    std::fs::write(&file, format!("127.0.0.1:{}:*:tester:{PASSWORD}\n", database.port())).unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert!(connects("NOTHING", "at all"));
}

/// Gives a file to the server's account.
fn give(server: &Server, path: &Path) {
    let owner = std::fs::metadata(server.directory()).unwrap();
    std::os::unix::fs::chown(path, Some(owner.uid()), Some(owner.gid())).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

/// Signs a certificate for this machine with itself; false where `openssl` is missing.
fn certificate(directory: &Path) -> bool {
    let made = Command::new("openssl")
        .args(["req", "-new", "-x509", "-days", "2", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=localhost"])
        .args(["-addext", "subjectAltName=DNS:localhost", "-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-keyout")
        .arg(directory.join("server.key"))
        .arg("-out")
        .arg(directory.join("server.crt"))
        .output();
    assert!(made.is_ok() || std::env::var("CI").as_deref() != Ok("true"), "openssl is promised under CI");
    made.is_ok_and(|made| made.status.success())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_asks_for_tls_and_one_that_has_none() {
    let Some(server) = own(Version::V15, &[("fsync", "off")]) else { return };
    let keys = tempfile::tempdir().unwrap();
    if !certificate(keys.path()) {
        return eprintln!("skipped: no openssl");
    }
    let database = server.database();
    let with = |parameters: &str| target(&format!("{}?{parameters}", database.url()));
    let none = refused(&with("sslmode=require")).await;
    says(&none, Class::Permanent, "TLS", "sslmode");

    for name in ["server.key", "server.crt"] {
        std::fs::copy(keys.path().join(name), server.directory().join(name)).unwrap();
        give(&server, &server.directory().join(name));
    }
    let rules = server.directory().join("pg_hba.conf");
    std::fs::write(&rules, "local all all trust\nhostssl all all all scram-sha-256\n").unwrap();
    database.execute("alter system set ssl = on");
    database.execute("select pg_reload_conf()");
    tokio::time::sleep(Duration::from_millis(500)).await;

    let plain = refused(&with("sslmode=disable")).await;
    says(&plain, Class::Permanent, "no pg_hba.conf entry", "sslmode=require");
    let root = keys.path().join("server.crt");
    let root = root.to_str().unwrap();
    let named = database.url().replace("127.0.0.1", "localhost");
    let cx = TestContext::new("step").forward();
    let encrypted = "select ssl::text from pg_stat_ssl where pid = pg_backend_pid()";
    for url in [
        database.url(),
        format!("{}?sslmode=require", database.url()),
        format!("{}?sslmode=verify-ca&sslrootcert={root}", database.url()),
        format!("{named}?sslmode=verify-full&sslrootcert={root}"),
    ] {
        let mut session = target(&url).connect(&cx).await.unwrap_or_else(|error| panic!("{url}: {error:?}"));
        let tls: String = sqlx::query_scalar(encrypted).fetch_one(session.connection()).await.unwrap();
        assert_eq!(tls, "true", "{url}");
    }
    let untrusted = refused(&with("sslmode=verify-full")).await;
    says(&untrusted, Class::Permanent, "certificate", "sslrootcert");
    let another = refused(&with(&format!("sslmode=verify-full&sslrootcert={root}"))).await;
    says(&another, Class::Permanent, "certificate", "sslrootcert");
    let missing = refused(&with("sslmode=verify-full&sslrootcert=/no/such/file.crt")).await;
    says(&missing, Class::Permanent, "connecting to database", "sslrootcert");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_takes_no_writes_is_told_apart() {
    let Some(server) = own(Version::V15, &[("fsync", "off")]) else { return };
    let database = server.database();
    let cx = TestContext::new("step").forward();
    database.execute(&format!("alter database {} set default_transaction_read_only = on", database.name()));
    let session = target(&database.url()).connect(&cx).await.unwrap();
    let error = session.require_writable().unwrap_err();
    says(&error, Class::Permanent, "default_transaction_read_only is on", "switch it off for this user or database");
    session.close().await;

    // Started with this file, a server follows whoever may feed it and takes no writes.
    server.stop_fast();
    let signal = server.directory().join("standby.signal");
    std::fs::write(&signal, "").unwrap();
    give(&server, &signal);
    server.start();
    let mut session = target(&database.url()).connect(&cx).await.unwrap();
    let error = session.require_writable().unwrap_err();
    says(&error, Class::Permanent, "the server is a standby", "primary");
    let error = session.execute(&cx, "create table t (n int)".into()).await.unwrap_err();
    says(&error.into(), Class::Permanent, "read-only transaction", "connect to the primary");
    let identity = target(&database.url()).identity(&cx).await.unwrap();
    assert!(identity.starts_with("system "), "{identity}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_room_and_one_that_stops_in_the_middle() {
    let settings =
        [("max_connections", "6"), ("superuser_reserved_connections", "0"), ("max_wal_senders", "0"), ("fsync", "off")];
    let Some(server) = own(Version::V15, &settings) else { return };
    let url = server.url("postgres");
    let mut held = Vec::new();
    while let Ok(connection) = PgConnection::connect(&url).await {
        held.push(connection);
        assert!(held.len() < 20);
    }
    let full = refused(&target(&url)).await;
    says(&full, Class::Transient, "too many clients already (53300)", "raise max_connections");
    drop(held);

    let cx = TestContext::new("step").forward();
    let mut session = loop {
        match target(&url).connect(&cx).await {
            Ok(session) => break session,
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    let stopping = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        tokio::task::block_in_place(|| server.stop_fast());
    };
    let (slept, ()) = tokio::join!(session.execute(&cx, "select pg_sleep(30)".into()), stopping);
    let error = slept.unwrap_err();
    assert!(error.is_connection_lost(), "{error:?}");
    says(&error.into(), Class::Transient, "terminating connection", "upgrade resume");
    let gone = refused(&target(&url)).await;
    says(&gone, Class::Transient, "Connection refused", "check that the server runs");
    server.start();
    target(&url).connect(&cx).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_with_few_rights_is_told_which_one_is_missing() {
    let Some(server) = own(Version::V16, &[("fsync", "off")]) else { return };
    let database = server.database();
    database.execute("create role poor login password 'pw-of-poor'");
    let db = target(&database.url().replace(&format!("tester:{PASSWORD}"), "poor:pw-of-poor"));
    let cx = TestContext::new("step").forward();
    // Anybody may ask for the identity, unless somebody took that away.
    db.identity(&cx).await.unwrap();
    database.execute("revoke execute on function pg_control_system() from public");
    let error = db.identity(&cx).await.unwrap_err();
    says(
        &error,
        Class::Permanent,
        "permission denied for function pg_control_system",
        "grant execute on function pg_control_system()",
    );
    database.execute(
        "grant execute on function pg_control_system() to poor; revoke connect on database postgres from public",
    );
    db.identity(&cx).await.unwrap();
    let error = db.connect_to(&cx, "postgres").await.unwrap_err();
    says(&error, Class::Permanent, "permission denied for database", "grant the privilege");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_in_the_file_system_leads_there_too() {
    let Some(server) = own(Version::V15, &[("fsync", "off")]) else { return };
    let directory = server.directory().parent().unwrap().to_str().unwrap();
    let cx = TestContext::new("step").forward();
    for url in [
        format!("postgres://tester@{}:{}/postgres", directory.replace('/', "%2F"), server.port()),
        format!("postgres:///postgres?user=tester&host={directory}&port={}", server.port()),
    ] {
        let db = Database::from_config(DatabaseConfig::new(url.as_str()), &BuildContext::new("/")).unwrap();
        let mut session = db.connect(&cx).await.unwrap();
        let by_socket: bool =
            sqlx::query_scalar("select inet_server_addr() is null").fetch_one(session.connection()).await.unwrap();
        assert!(by_socket, "{url}");
        assert_eq!(db.lock().to_string(), format!("postgres:localhost:{}/postgres", server.port()));
    }
    let nowhere = DatabaseConfig::new("postgres:///postgres?user=tester&host=/no/such/directory");
    let error = refused(&Database::from_config(nowhere, &BuildContext::new("/")).unwrap()).await;
    says(&error, Class::Transient, "No such file or directory", "check that the server runs");
}

fn asleep(database: &postgres::Database) -> String {
    database.text("select count(*) from pg_stat_activity where query like 'select pg_sleep%' and state = 'active' and datname = current_database()")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_call_left_running_is_ended_and_nobody_elses() {
    let Some(database) = any_database() else { return };
    let db = Arc::new(target(&database.url()));
    let steps = [TestContext::new("one"), TestContext::new("two")];
    for step in &steps {
        let (db, cx) = (Arc::clone(&db), step.forward());
        let calling = tokio::spawn(async move {
            let mut session = db.connect(&cx).await.unwrap();
            sqlx::raw_sql("select pg_sleep(600)").execute(session.connection()).await.map(drop)
        });
        while asleep(&database) == "0" {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
        // As a crash does, without a word to the server.
        calling.abort();
    }
    let began = Instant::now();
    db.settle(&steps[0].back()).await.unwrap();
    if began.elapsed() < Duration::from_millis(1500) {
        assert_eq!(asleep(&database), "1");
    }
    // The other one's ends as the server sees that nobody is there any more.
    while asleep(&database) != "0" {
        assert!(began.elapsed() < Duration::from_secs(10), "it goes on");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    db.settle(&steps[0].back()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn functions_that_somebody_put_into_the_search_path_are_not_called() {
    let Some(database) = any_database() else { return };
    database.execute(
        "create table fooled (by text); \
         create function public.concat(text, text, text, text) returns text language plpgsql as $$ begin insert into public.fooled values ('concat'); return 'x'; end $$; \
         create function public.pg_terminate_backend(int) returns boolean language plpgsql as $$ begin insert into public.fooled values ('terminate'); return true; end $$; \
         create function public.starts_with(name, text) returns boolean language sql as $$ select true $$; \
         create function public.literal(text) returns text language sql as $$ select $1 $$",
    );
    let db = target(&database.url());
    let cx = TestContext::new("step").forward();
    assert!(db.identity(&cx).await.unwrap().contains(database.name()));
    db.settle(&cx).await.unwrap();
    assert_eq!(database.text("select count(*) from fooled"), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_in_session_mode_serves_and_any_other_is_refused_before_anything_is_changed() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let cx = TestContext::new("step").forward();
    let direct = target(&database.url()).identity(&cx).await.unwrap();
    for (mode, settings) in [
        (Mode::Session, &[("application_name_add_host", "1")][..]),
        (Mode::Transaction, &[]),
        (Mode::Transaction, &[("max_client_conn", "20")]),
        (Mode::Statement, &[]),
    ] {
        let Some(pooler) = pgbouncer::start(&server, mode, settings) else { return };
        let db = target(&pooler.url(database.name()));
        if mode == Mode::Session {
            assert_eq!(db.identity(&cx).await.unwrap(), direct);
            continue;
        }
        let error = db.identity(&cx).await.unwrap_err();
        says(&error, Class::Permanent, "gives each transaction another session", "pool_mode = session");
    }
}
