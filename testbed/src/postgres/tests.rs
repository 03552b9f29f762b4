#![cfg(test)]

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::*;

#[test]
fn every_version_starts_and_is_what_it_says() {
    for version in Version::ALL {
        let Some(server) = shared(version) else {
            continue;
        };
        let database = server.database();
        let number = database.text("SHOW server_version_num");
        assert!(number.starts_with(&version.to_string()), "{number}");
        assert_eq!(database.text("SELECT current_user"), USER);
        let told = Command::new(server.bin("pg_dump")).arg("--version").output();
        let told = String::from_utf8(told.unwrap().stdout).unwrap();
        assert!(told.contains(&format!(" {version}.")), "{told}");
    }
}

#[test]
fn a_database_is_fresh_and_dropped() {
    let Some(server) = shared(Version::V15) else {
        return;
    };
    let (one, other) = (server.database(), server.database());
    assert_ne!(one.name(), other.name());
    one.execute("CREATE TABLE t (a int); INSERT INTO t VALUES (2), (1), (NULL)");
    one.execute("CREATE SCHEMA \"S 1\"; CREATE TABLE \"S 1\".u (x text); COMMENT ON TABLE t IS 'c'");
    assert_eq!(one.contents(), "\"S 1\".u\npublic.t\n  ()\n  (1)\n  (2)\n");
    assert_eq!(one.text("SELECT a FROM t ORDER BY a"), "1\n2\nNULL");
    assert!(one.schema().contains("CREATE TABLE public.t"), "{}", one.schema());
    assert!(one.schema().contains("COMMENT ON TABLE public.t"));
    assert_eq!(one.schema(), one.schema());
    assert_eq!(other.contents(), "");
    let count = format!("SELECT count(*) FROM pg_database WHERE datname = '{}'", one.name());
    assert_eq!(other.text(&count), "1");
    drop(one);
    assert_eq!(other.text(&count), "0");
}

#[tokio::test]
async fn it_works_inside_a_runtime() {
    let Some(server) = shared(Version::V15) else {
        return;
    };
    assert_eq!(server.database().text("SELECT 1 + 1"), "2");
}

#[test]
#[should_panic(expected = "no_such_table")]
fn a_statement_that_fails_says_what_the_server_said() {
    let Some(server) = shared(Version::V15) else {
        panic!("no server, and no no_such_table");
    };
    server.database().execute("SELECT 1; SELECT * FROM no_such_table");
}

#[test]
fn an_own_server_comes_back_on_its_port_with_what_was_committed() {
    let directory;
    {
        let Some(server) = own(Version::V16, &[("work_mem", "7MB")]) else {
            return;
        };
        let database = server.database();
        assert_eq!(database.text("SHOW work_mem"), "7MB");
        assert_eq!(database.text("SHOW fsync"), "on");
        database.execute("CREATE TABLE t (a int)");
        database.execute("INSERT INTO t VALUES (1)");
        let port = server.port();
        server.stop_immediate();
        assert!(std::net::TcpStream::connect((server.host(), port)).is_err());
        server.start();
        assert_eq!(database.text("SELECT a FROM t"), "1");
        assert!(server.log().contains("not properly shut down"));
        server.stop_fast();
        server.start();
        assert_eq!((server.port(), database.text("SELECT a FROM t").as_str()), (port, "1"));
        directory = server.directory().to_owned();
    }
    assert!(!directory.exists());
}

#[test]
fn an_own_server_ends_with_a_process_that_is_killed() {
    if found(Version::V15).is_none() {
        return;
    }
    let mut child = again("held", "own").spawn().unwrap();
    let pid = line_of(&mut child, "postmaster");
    assert!(alive(&pid));
    child.kill().unwrap();
    child.wait().unwrap();
    until(|| !alive(&pid));
}

#[test]
fn a_shared_server_outlives_two_processes_and_ends_when_idle() {
    if found(Version::V15).is_none() {
        return;
    }
    let base = PathBuf::from(format!("/var/tmp/upgrade-testbed-test-{}", std::process::id()));
    let start = || {
        let mut child = again("held", base.to_str().unwrap()).spawn().unwrap();
        let pid = line_of(&mut child, "postmaster");
        (child, pid)
    };
    let (mut one, first) = start();
    let (mut other, second) = start();
    assert_eq!(first, second);
    one.kill().unwrap();
    one.wait().unwrap();
    // Longer than the two seconds after which an idle one ends.
    std::thread::sleep(Duration::from_secs(5));
    assert!(alive(&first));
    other.kill().unwrap();
    other.wait().unwrap();
    until(|| !alive(&first) && !base.join("shared-15/server").exists());
    std::fs::remove_dir_all(&base).unwrap();
}

/// Not a test: what the two above run in processes of their own.
#[test]
fn held() {
    let Ok(what) = std::env::var("TESTBED_HELD") else {
        return;
    };
    let bin = binaries::of(Version::V15).unwrap();
    let (server, share);
    let data = if what == "own" {
        server = own(Version::V15, &[]).unwrap();
        server.directory()
    } else {
        share = super::shared::take(&Home::at(what.into()), Version::V15, &bin, 2);
        &share.service.data
    };
    let pid = std::fs::read_to_string(data.join("postmaster.pid")).unwrap();
    println!("\npostmaster {}", pid.lines().next().unwrap());
    std::thread::sleep(Duration::from_secs(120));
}

fn again(test: &str, what: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", &format!("postgres::tests::{test}"), "--nocapture"])
        .env("TESTBED_HELD", what)
        .stdout(Stdio::piped());
    command
}

fn line_of(child: &mut std::process::Child, word: &str) -> String {
    use std::io::BufRead;
    let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    lines
        .map_while(Result::ok)
        .find_map(|line| line.strip_prefix(word).map(|rest| rest.trim().to_owned()))
        .expect("the other process started its server")
}

fn alive(pid: &str) -> bool {
    // One that has ended and was not waited for has no directory of its own any more.
    std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok()
}

fn until(condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
#[ignore = "a measurement"]
fn how_long_a_database_takes() {
    for version in Version::ALL {
        let Some(server) = shared(version) else {
            continue;
        };
        drop(server.database());
        let (mut created, mut dropped) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..20 {
            let began = Instant::now();
            let database = server.database();
            created += began.elapsed();
            let began = Instant::now();
            drop(database);
            dropped += began.elapsed();
        }
        let began = Instant::now();
        let own = own(version, &[]);
        let started = began.elapsed();
        let began = Instant::now();
        drop(own);
        println!(
            "{version}: created in {:?}, dropped in {:?}; own server in {started:?}, gone in {:?}",
            created / 20,
            dropped / 20,
            began.elapsed()
        );
    }
}
