//! Programs: what they are told, what of them is kept, and how they end.

#![cfg(test)]

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use secrecy::SecretString;
use upgrade_core::context::Context;
use upgrade_core::error::Class;
use upgrade_core::secret::Secrets;
use upgrade_core::testkit::TestContext;
use upgrade_postgres::address::Address;
use upgrade_postgres::program::{Program, end_leftovers};

fn shell(script: &str) -> Program {
    Program::new(["/bin/sh", "-c", script])
}

#[tokio::test]
async fn a_program_is_led_by_its_environment_and_no_password_is_an_argument() {
    let cx = TestContext::new("step").forward();
    let address = Address::parse("postgres://ann:hunter2@db.example:6432/a%20b?sslmode=require").unwrap();
    let program = shell("tr '\\0' ' ' < /proc/self/cmdline; echo; env | sort").on(&cx, &address).unwrap();
    assert!(!program.line().contains("hunter2") && !format!("{program:?}").contains("hunter2"), "{program:?}");
    let ended = program.with_env("OWN", "value").succeed(&cx).await.unwrap();
    for line in [
        "PGHOST=db.example",
        "PGPORT=6432",
        "PGDATABASE=a b",
        "PGUSER=ann",
        "PGPASSWORD=hunter2",
        "PGSSLMODE=require",
        "OWN=value",
    ] {
        assert!(ended.stdout.lines().any(|found| found == line), "{line}: {}", ended.stdout);
    }
    assert!(ended.stdout.contains(&format!("{}={}", Context::MARKER, cx.marker())));
    assert!(ended.stdout.contains("PGAPPNAME=upgrade/step/"), "{}", ended.stdout);
    assert_eq!(ended.stdout.matches("hunter2").count(), 1, "{}", ended.stdout);
}

#[tokio::test]
async fn what_it_complains_about_is_kept_and_masked() {
    let secrets = Secrets::default();
    secrets.remember(&SecretString::from("hunter2-of-ann"));
    let cx = TestContext::new("step").secrets(secrets).forward();
    let error = shell("echo \"password $WORD is wrong\" >&2; exit 3")
        .with_env("WORD", "hunter2-of-ann")
        .succeed(&cx)
        .await
        .unwrap_err();
    assert!(error.message().ends_with("failed: exit code 3"), "{error:?}");
    assert!(error.detail().unwrap().contains("is wrong") && !format!("{error:?}").contains("hunter2"), "{error:?}");
    for (said, class) in [
        ("could not write to file: No space left on device", Class::Permanent),
        ("server closed the connection unexpectedly", Class::Transient),
        ("permission denied for table a", Class::Permanent),
    ] {
        let error = shell(&format!("echo '{said}' >&2; exit 1")).succeed(&cx).await.unwrap_err();
        assert_eq!(error.class(), class, "{error:?}");
        assert!(error.hint().is_some());
    }
    let long =
        shell("i=0; while [ $i -lt 20000 ]; do echo line $i >&2; i=$((i + 1)); done; exit 1").run(&cx).await.unwrap();
    assert!(long.stderr.ends_with("line 19999") && long.stderr.len() < 80 << 10, "{}", long.stderr.len());
    assert_eq!(shell("kill -9 $$").run(&cx).await.unwrap().how(), "signal 9");
}

#[tokio::test]
async fn what_cannot_be_started_says_what_to_do() {
    let cx = TestContext::new("step").forward();
    for (program, hint) in [
        (Program::new(["no-such-program-here"]), "not in PATH"),
        (Program::new(["/no/such/program"]), "check that /no/such/program is there"),
        (Program::new(["/etc/passwd"]), "executable"),
        (shell("true").within("/no/such/directory"), "make the working directory"),
        (Program::new([""; 0]), "name a program"),
    ] {
        let error = program.run(&cx).await.unwrap_err();
        assert!(error.class() == Class::Permanent && error.hint().unwrap().contains(hint), "{error:?}");
    }
}

#[tokio::test]
async fn files_take_the_place_of_input_and_output() {
    let cx = TestContext::new("step").forward();
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("from"), directory.path().join("to"));
    std::fs::write(&from, "some text").unwrap();
    let ended = Program::new(["cat"]).reading(&from).writing(&to).within(directory.path()).succeed(&cx).await.unwrap();
    assert_eq!((ended.stdout.as_str(), std::fs::read_to_string(&to).unwrap().as_str()), ("", "some text"));
    assert_eq!(std::fs::metadata(&to).unwrap().permissions().mode() & 0o777, 0o600);
}

#[tokio::test]
async fn a_cancelled_one_ends_with_all_that_it_started() {
    let test = TestContext::new("step");
    let cx = test.forward();
    let directory = tempfile::tempdir().unwrap();
    let grown = directory.path().join("grown");
    let script = format!("(while true; do echo more >> {}; sleep 0.01; done) & wait", grown.display());
    let program = shell(&script);
    let running = program.run(&cx);
    let cancelling = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        test.cancellation().cancel();
    };
    let began = Instant::now();
    let (ended, ()) = tokio::join!(running, cancelling);
    assert!(ended.unwrap_err().message().contains("was ended"));
    assert!(began.elapsed() < Duration::from_secs(5));
    let size = std::fs::metadata(&grown).unwrap().len();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(std::fs::metadata(&grown).unwrap().len(), size);
    assert!(program.run(&cx).await.unwrap_err().message().contains("was not started"));
}

#[tokio::test]
async fn what_an_interrupted_call_left_is_ended_by_its_marker() {
    let cx = TestContext::new("step").forward();
    // As after a crash: its parent is gone, and it stands in a group of its own.
    let ended = shell("setsid sleep 300 > /dev/null 2>&1 & echo $!").succeed(&cx).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    let sleeps = || {
        let marker = format!("{}={}", Context::MARKER, cx.marker());
        std::fs::read_dir("/proc").unwrap().flatten().any(|process| {
            std::fs::read(process.path().join("environ"))
                .is_ok_and(|environment| String::from_utf8_lossy(&environment).split('\0').any(|entry| entry == marker))
        })
    };
    assert!(sleeps(), "{ended:?}");
    end_leftovers(&cx).await.unwrap();
    assert!(!sleeps());
}
