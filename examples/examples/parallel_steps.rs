//! Builds three parts side by side, two at a time, and a bundle out of them; then fails after
//! the bundle and shows that all of it is undone, the bundle first.
//!
//! cargo run -p upgrade-examples --example parallel_steps

use std::error::Error;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use std::{fs, io};

use async_trait::async_trait;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::{CheckError, StepError};
use upgrade_core::executor::{Executor, Interrupt, Outcome, RunOptions};
use upgrade_core::journal::MemoryJournal;
use upgrade_core::names::StepId;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::verdict::Verdict;

/// Counts what runs at the same time and notes the order of undoing.
#[derive(Default)]
struct Seen {
    running: AtomicUsize,
    most: AtomicUsize,
    undone: Mutex<Vec<String>>,
}

/// Makes a file out of the files that earlier steps made.
struct Build {
    file: PathBuf,
    parts: Vec<StepId>,
    seen: Arc<Seen>,
}

#[async_trait]
impl Step for Build {
    const KIND: &'static str = "example.build";
    type Undo = ();
    type Output = PathBuf;

    async fn prepare(&self, _cx: &Context) -> Result<Prepared<(), PathBuf>, StepError> {
        if self.file.exists() {
            return Ok(Prepared::unchanged(self.file.clone(), "it is built"));
        }
        Ok(Prepared::change((), [Change::new(Effect::Create, self.file.to_string_lossy())]))
    }

    async fn apply(&self, cx: &Context, _undo: &()) -> Result<PathBuf, StepError> {
        let running = self.seen.running.fetch_add(1, Ordering::SeqCst) + 1;
        self.seen.most.fetch_max(running, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut content = format!("{}\n", cx.subject());
        for part in &self.parts {
            content += &fs::read_to_string(cx.output::<PathBuf>(part)?).map_err(|error| self.failed(&error))?;
        }
        fs::write(&self.file, content).map_err(|error| self.failed(&error))?;
        self.seen.running.fetch_sub(1, Ordering::SeqCst);
        Ok(self.file.clone())
    }
}

#[async_trait]
impl Rollback for Build {
    async fn rollback(&self, cx: &Context, _undo: &(), _output: Option<&PathBuf>) -> Result<(), StepError> {
        self.seen.undone.lock().unwrap_or_else(PoisonError::into_inner).push(cx.subject().to_owned());
        match fs::remove_file(&self.file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(self.failed(&error)),
            _ => Ok(()),
        }
    }
}

impl Build {
    fn failed(&self, error: &io::Error) -> StepError {
        StepError::permanent(format!("{} cannot be built", self.file.display()))
            .with_cause(error)
            .with_hint("see whether the directory can be written and has space")
    }
}

/// Passes or fails, as it is told.
struct Answer(bool);

#[async_trait]
impl Check for Answer {
    async fn check(&self, _cx: &Context) -> Result<Verdict, CheckError> {
        Ok(if self.0 { Verdict::pass("the bundle is good") } else { Verdict::fail("the bundle is not good") })
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let executor = Executor::new(Arc::new(MemoryJournal::new()));
    for good in [false, true] {
        let seen = Arc::new(Seen::default());
        let build = |name: &str, parts: &[&str]| -> Result<Build, Box<dyn Error>> {
            let parts = parts.iter().map(|part| StepId::try_from(*part)).collect::<Result<_, _>>()?;
            Ok(Build { file: directory.path().join(name), parts, seen: seen.clone() })
        };
        let pipeline = Pipeline::builder("site")
            .max_parallel(2)
            .step_with("pages", build("pages", &[])?, |options| options.needs([""; 0]))
            .step_with("images", build("images", &[])?, |options| options.needs([""; 0]))
            .step_with("search", build("search", &["pages"])?, |options| options.needs(["pages"]))
            .step_with("bundle", build("bundle", &["images", "search"])?, |options| options.needs(["images", "search"]))
            .verify("bundle", Answer(good))
            .build()?;
        let report = executor.run(&pipeline, &RunOptions::default(), &Interrupt::new()).await?;
        assert_eq!(seen.most.load(Ordering::SeqCst), 2, "pages and images are built side by side");
        let undone = seen.undone.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if good {
            assert_eq!(report.outcome, Outcome::Committed);
            assert_eq!(fs::read_to_string(directory.path().join("bundle"))?, "bundle\nimages\nsearch\npages\n");
        } else {
            assert!(matches!(report.outcome, Outcome::RolledBack { .. }), "{report:?}");
            assert_eq!(undone.first().map(String::as_str), Some("bundle"));
            assert_eq!(fs::read_dir(directory.path())?.count(), 0, "nothing is left of it");
        }
        println!("{} undone: {undone:?}", report.run);
    }
    Ok(())
}
