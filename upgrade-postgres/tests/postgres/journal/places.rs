//! Where a journal may be kept: the way to the server, the server, the user.

use std::sync::Arc;
use std::time::Duration;

use upgrade_core::journal::{Journal, JournalError, conformance};
use upgrade_core::names::LockName;
use upgrade_postgres::PostgresJournal;
use upgrade_testbed::pgbouncer::{self, Mode};
use upgrade_testbed::postgres::{Version, own, shared};

use super::{address, open};

fn unusable(answer: Result<PostgresJournal, JournalError>) -> (String, String) {
    match answer {
        Err(error @ (JournalError::Unusable { .. } | JournalError::Server { .. })) => {
            let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            (format!("{error}: {cause}"), error.hint())
        }
        other => panic!("refused, not {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_pooler_in_session_mode_it_keeps_the_contract() {
    for version in Version::ALL {
        let Some(server) = shared(version) else { continue };
        let database = server.database();
        for settings in [&[][..], &[("ignore_startup_parameters", "options")]] {
            let settings = [settings, &[("default_pool_size", "60")]].concat();
            let Some(pooler) = pgbouncer::start(&server, Mode::Session, &settings) else { return };
            let journal = open(&pooler.url(database.name())).await;
            conformance::all(|| Arc::new(journal.clone())).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_in_another_mode_is_recognised_and_refused() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    open(&database.url()).await;
    for mode in [Mode::Transaction, Mode::Statement] {
        for settings in [
            &[][..],
            &[("ignore_startup_parameters", "options")],
            &[("default_pool_size", "1")],
            &[("server_round_robin", "1"), ("min_pool_size", "4")],
        ] {
            let Some(pooler) = pgbouncer::start(&server, mode, settings) else { return };
            for _ in 0..5 {
                let (message, hint) = unusable(PostgresJournal::open(address(&pooler.url(database.name()))).await);
                assert!(message.contains("gives each transaction another session"), "{mode} {settings:?}: {message}");
                assert!(hint.contains("pool_mode = session"), "{hint}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_in_transaction_mode_is_recognised_while_others_use_it() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let Some(pooler) = pgbouncer::start(&server, Mode::Transaction, &[]) else { return };
    let url = pooler.url(database.name());
    let others: Vec<_> = (0..6)
        .map(|_| {
            let url = url.clone();
            tokio::spawn(async move {
                let options: sqlx::postgres::PgConnectOptions = url.parse().unwrap();
                let options = options.extra_float_digits(None);
                let mut connection = sqlx::ConnectOptions::connect(&options).await.unwrap();
                loop {
                    sqlx::Executor::execute(&mut connection, sqlx::raw_sql("SELECT pg_sleep(0.002)")).await.unwrap();
                }
            })
        })
        .collect();
    for _ in 0..20 {
        let (message, _) = unusable(PostgresJournal::open(address(&url)).await);
        assert!(message.contains("gives each transaction another session"), "{message}");
    }
    for other in others {
        other.abort();
    }
}

#[tokio::test]
async fn what_keeps_a_journal_from_being_there_is_told_with_the_remedy() {
    let Some(server) = shared(Version::V16) else { return };
    let database = server.database();
    let role = format!("poor_{}", database.name());
    database.execute(&format!("CREATE ROLE {role} LOGIN PASSWORD 'pw'"));
    let at = |user: &str, port: u16, name: &str| format!("postgres://{user}@127.0.0.1:{port}/{name}");
    let latin = format!("latin_{}", database.name());
    database.execute(&format!("CREATE DATABASE {latin} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0"));
    let (tester, port) = ("tester:secret-of-tester", server.port());
    for (url, said, hint) in [
        (at("tester:wrong", port, database.name()), "28P01", "PGPASSWORD"),
        (at(tester, port, "no_such"), "3D000", "create the database"),
        (at(&format!("{role}:pw"), port, database.name()), "42501", "GRANT CREATE"),
        (at(tester, port, &latin), "LATIN1", "ENCODING 'UTF8'"),
        (at(tester, port, &format!("{}?sslmode=require", database.name())), "TLS", "sslmode"),
        (at(tester, 1, database.name()), "refused", "bring the server back"),
    ] {
        let (message, told) = unusable(PostgresJournal::open(address(&url)).await);
        assert!(message.contains(said) && told.contains(hint), "{said}: {message} / {told}");
        assert!(!message.contains("wrong") && !message.contains("secret-of"), "{message}");
    }
    database.execute(format!("DROP DATABASE {latin}; DROP ROLE {role}").split(';').next().unwrap());
    database.execute(&format!("DROP ROLE {role}"));
}

#[tokio::test]
async fn a_user_without_rights_of_its_own_is_served_by_a_schema_of_its_own() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let role = format!("keeper_{}", database.name());
    database.execute(&format!(
        "CREATE ROLE {role} LOGIN PASSWORD 'pw'; CREATE SCHEMA upgrades AUTHORIZATION {role}; \
         REVOKE ALL ON DATABASE {} FROM PUBLIC; GRANT CONNECT ON DATABASE {} TO {role}",
        database.name(),
        database.name()
    ));
    let url = format!("postgres://{role}:pw@127.0.0.1:{}/{}?schema=upgrades", server.port(), database.name());
    let journal = open(&url).await;
    conformance::all(|| Arc::new(journal.clone())).await;
    drop(journal);
    database.execute(&format!("DROP OWNED BY {role}"));
    database.execute(&format!("DROP ROLE {role}"));
}

#[tokio::test]
async fn commits_are_durable_whatever_the_server_has_as_its_default() {
    let Some(server) = own(Version::V16, &[("synchronous_commit", "off")]) else { return };
    let database = server.database();
    let journal = open(&database.url()).await;
    let run = upgrade_core::names::RunId::generate();
    let lease = journal.acquire(&[LockName::new("test", "durable").unwrap()], Duration::ZERO).await.unwrap();
    let mut appended = journal.append(&lease, &run, 0, &[conformance::created(&run, "durable")]).await.unwrap();
    for _ in 0..20 {
        appended
            .extend(journal.append(&lease, &run, appended.len() as u64, &[conformance::undoing("x")]).await.unwrap());
    }
    server.stop_immediate();
    server.start();
    assert_eq!(open(&database.url()).await.load(&run).await.unwrap(), appended);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_serves_readers_and_no_driver() {
    let Some(server) = own(Version::V15, &[("fsync", "off")]) else { return };
    let standby = server.standby(&[]);
    let database = server.database();
    let journal = open(&database.url()).await;
    let run = upgrade_core::names::RunId::generate();
    let name = [LockName::new("test", "standby").unwrap()];
    let lease = journal.acquire(&name, Duration::ZERO).await.unwrap();
    let appended = journal.append(&lease, &run, 0, &[conformance::created(&run, "standby")]).await.unwrap();
    drop(lease);
    let began = std::time::Instant::now();
    let reader = loop {
        match PostgresJournal::open_existing(address(&standby.url(database.name()))).await {
            Ok(Some(reader)) if reader.load(&run).await.is_ok() => break reader,
            other => assert!(began.elapsed() < Duration::from_secs(20), "{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(reader.load(&run).await.unwrap(), appended);
    assert_eq!(reader.runs().await.unwrap().len(), 1);
    match reader.acquire(&name, Duration::ZERO).await {
        Err(error @ JournalError::Unusable { .. }) => assert!(error.hint().contains("primary"), "{error:?}"),
        other => panic!("{other:?}"),
    }
    let (_, hint) =
        unusable(PostgresJournal::open(address(&format!("{}?schema=new", standby.url(database.name())))).await);
    assert!(hint.contains("primary"), "{hint}");
}

#[tokio::test]
async fn it_names_the_database_and_what_else_it_lives_in() {
    let Some(server) = shared(Version::V15) else { return };
    let database = server.database();
    let journal = open(&format!("{}?lives_in=service:postgresql", database.url())).await;
    let home: Vec<_> = journal.home().iter().map(ToString::to_string).collect();
    let database = format!("postgres:localhost:{}/{}", server.port(), database.name());
    // As systemd spells the unit, and as people do.
    assert_eq!(home, [database.as_str(), "service:postgresql", "service:postgresql.service"]);
}
