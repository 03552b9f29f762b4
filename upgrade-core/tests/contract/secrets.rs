//! Point 14: no secrets at rest.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use serde_json::json;
use upgrade_core::check::Check;
use upgrade_core::context::{Context, Progress};
use upgrade_core::entry::Record;
use upgrade_core::error::{CheckError, StepError};
use upgrade_core::executor::{Executor, Interrupt, Observer, Outcome, Report, RunOptions};
use upgrade_core::journal::FileJournal;
use upgrade_core::names::RunId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::secret::{ExposeSecret, SecretRef, SecretSource, SecretString, Secrets};
use upgrade_core::step::{Change, Effect, Prepared};
use upgrade_core::verdict::Verdict;

use crate::scripted::{Bench, Scripted, changing, failing};

/// With a quote and a backslash: what JSON escapes must be found as well.
const CANARY: &str = "canary-4f\"1b\\e7-sings";
/// What is left of the canary when escapes are taken off.
const BITS: [&str; 2] = ["canary-4f", "e7-sings"];
const OTHER: &str = "another-canary-77aa";

struct Given;

#[async_trait]
impl SecretSource for Given {
    async fn read(&self, _: &str) -> Result<SecretString, StepError> {
        Ok(SecretString::from(CANARY))
    }
}

/// Writes down all that an observer is shown.
struct Listener(Arc<Mutex<String>>);

impl Observer for Listener {
    fn entry(&mut self, _: &RunId, record: &Record) {
        *self.0.lock().unwrap() += &format!("{record:?}{}", serde_json::to_string(record).unwrap());
    }
    fn progress(&mut self, progress: &Progress) {
        *self.0.lock().unwrap() += &format!("{progress:?}");
    }
}

struct Leaking;

#[async_trait]
impl Check for Leaking {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let leaked = cx.secret(&SecretRef::other("given", "x")).await?.expose_secret().to_owned();
        Ok(Verdict::pass(leaked.clone()).with_hint(leaked.clone()).with_fact("told", leaked))
    }
}

fn read_all(directory: &Path, text: &mut Vec<u8>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        text.extend(path.to_string_lossy().as_bytes());
        if path.is_dir() {
            read_all(&path, text);
        } else {
            text.extend(std::fs::read(&path).unwrap());
        }
    }
}

struct Aviary {
    directory: tempfile::TempDir,
    heard: Arc<Mutex<String>>,
}

impl Aviary {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("secret.txt"), format!("{OTHER}\n")).unwrap();
        Self { directory, heard: Arc::default() }
    }

    fn executor(&self) -> Executor {
        let journal = FileJournal::open(self.directory.path().join("state")).unwrap();
        let secrets = Secrets::default().with_source("given", Arc::new(Given));
        Executor::new(Arc::new(journal)).with_secrets(secrets).observer(Listener(self.heard.clone()))
    }

    async fn run(&self, step: Scripted, fails: bool) -> Report {
        let builder = Pipeline::builder("p").check("leaking", Leaking).step("a", step);
        let builder = if fails { builder.verify("no", failing()) } else { builder };
        let executor = self.executor();
        let pipeline = builder.build().unwrap();
        let report = executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await.unwrap();
        self.is_silent(&format!("{report:?} {}", serde_json::to_string(&report).unwrap()));
        report
    }

    /// Fails if a canary sings anywhere: in the journal's directory, at an observer, in a text.
    fn is_silent(&self, text: &str) {
        let mut written = Vec::new();
        read_all(&self.directory.path().join("state"), &mut written);
        let heard = self.heard.lock().unwrap();
        for (place, text) in [
            ("journal", String::from_utf8_lossy(&written)),
            ("observer", heard.as_str().into()),
            ("report", text.into()),
        ] {
            for canary in BITS.into_iter().chain([OTHER]) {
                assert!(!text.contains(canary), "{canary} is in the {place}");
            }
        }
        assert!(written.len() > 1000 && heard.contains("StepPrepared") | heard.contains("StepFailed"));
    }

    fn file(&self) -> SecretRef {
        SecretRef::file(self.directory.path().join("secret.txt").to_str().unwrap())
    }
}

async fn both(cx: &Context, file: &SecretRef) -> String {
    let given = cx.secret(&SecretRef::other("given", "x")).await.unwrap();
    let file = cx.secret(file).await.unwrap();
    format!("{} and {}", given.expose_secret(), file.expose_secret())
}

#[tokio::test]
async fn a_secret_that_a_step_leaks_is_written_and_shown_nowhere() {
    let aviary = Aviary::new();
    let bench = Bench::default();
    let (one, two, three) = (aviary.file(), aviary.file(), aviary.file());
    let a = bench
        .step("a")
        .preparing(move |cx| {
            let file = one.clone();
            async move {
                let leaked = both(&cx, &file).await;
                let change = Change::new(Effect::Modify, leaked.clone()).with_summary(leaked.clone());
                Ok(changing(change.with_diff(leaked.clone()).undo_loses(leaked)))
            }
        })
        .applying(move |cx| {
            let file = two.clone();
            async move {
                let leaked = both(&cx, &file).await;
                cx.progress(1, 2, leaked.clone());
                assert!(cx.checkpoint(&json!({ "at": leaked })).await.is_err(), "a checkpoint took a secret");
                assert!(cx.checkpoint(&json!({ leaked.clone(): 1 })).await.is_err(), "a checkpoint's key took one");
                Ok(json!({ "leaked": [leaked.clone()], leaked: true }))
            }
        })
        .rolling_back(move |cx| {
            let file = three.clone();
            async move {
                let leaked = both(&cx, &file).await;
                let cause = std::io::Error::other(leaked.clone());
                let error = StepError::permanent(leaked.clone()).with_cause(&cause).with_hint(leaked.clone());
                if cx.attempt() > 1 { Ok(()) } else { Err(error.with_detail(leaked)) }
            }
        });
    let report = aviary.run(a, true).await;
    assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
}

#[tokio::test]
async fn a_secret_in_a_panic_is_masked() {
    let aviary = Aviary::new();
    let file = aviary.file();
    let a = Bench::default().step("a").applying(move |cx| {
        let file = file.clone();
        async move { std::panic::resume_unwind(Box::new(both(&cx, &file).await)) }
    });
    assert!(matches!(aviary.run(a, false).await.outcome, Outcome::RolledBack { .. }));
}

#[tokio::test]
async fn an_undo_record_with_a_secret_is_refused() {
    for key in [true, false] {
        let aviary = Aviary::new();
        let file = aviary.file();
        let bench = Bench::default();
        let a = bench.step("a").preparing(move |cx| {
            let file = file.clone();
            async move {
                let leaked = both(&cx, &file).await;
                Ok(Prepared::change(if key { json!({ leaked: 1 }) } else { json!([leaked]) }, []))
            }
        });
        let report = aviary.run(a, false).await;
        assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
        assert_eq!(bench.count("apply a"), 0);
    }
}

#[tokio::test]
async fn found_contents_are_kept_apart_for_the_owner_alone_and_removed_at_the_end() {
    let aviary = Aviary::new();
    let state = aviary.directory.path().join("state");
    let looked = state.clone();
    let a = Bench::default()
        .step("a")
        .preparing(|cx| async move { Ok(Prepared::change(json!(cx.seal(CANARY.as_bytes()).await?), [])) })
        .applying(move |_| {
            let mut sealed = Vec::new();
            sealed_files(&looked, &mut sealed);
            assert!(!sealed.is_empty(), "nothing was sealed");
            for path in &sealed {
                let mode = std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
                assert_eq!(mode, 0o600, "{}", path.display());
            }
            async { Ok(json!(null)) }
        });
    aviary.run(a, false).await;
    let mut left = Vec::new();
    sealed_files(&state, &mut left);
    assert!(left.is_empty(), "{left:?}");
}

/// Lists the files that hold the canary.
fn sealed_files(directory: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sealed_files(&path, found);
        } else if String::from_utf8_lossy(&std::fs::read(&path).unwrap()).contains(BITS[0]) {
            found.push(path);
        }
    }
}

#[tokio::test]
async fn debug_and_display_show_the_reference() {
    let reference = SecretRef::env("DATABASE_URL");
    assert_eq!(reference.to_string(), "{ env: DATABASE_URL }");
    let secrets = Secrets::default().with_source("given", Arc::new(Given));
    let secret = secrets.resolve(&SecretRef::other("given", "x")).await.unwrap();
    for text in [format!("{secrets:?}"), format!("{secret:?}"), format!("{reference:?}")] {
        assert!(!text.contains(BITS[0]), "{text}");
    }
}

#[test]
fn a_secret_that_is_part_of_another_leaves_nothing_of_it() {
    let secrets = Secrets::default();
    secrets.remember(&SecretString::from("swordfish"));
    secrets.remember(&SecretString::from("swordfish-and-more"));
    assert!(!secrets.mask("it is swordfish-and-more").contains("more"));
}
