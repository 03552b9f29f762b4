//! What the commands share: the journal, the kinds, the way to drive a run and to end it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use upgrade_core::executor::{Executor, ExecutorError, Interrupt, Report};
use upgrade_core::file;
use upgrade_core::journal::Journal;
use upgrade_core::journal::file::FileJournal;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::registry::Registry;
use upgrade_core::secret::Secrets;

use crate::arguments::{Global, PipelineFile};
use crate::console::Console;
use crate::exit::{Asked, Exit};
use crate::failure::{Failure, Result};
use crate::interruption::{self, Listening};
use crate::render::narrator::{Curtain, Narrator};
use crate::render::{Title, ending};

/// Tells how a command ended: its exit status, and the last object of JSON output.
#[derive(Debug)]
pub(crate) struct Ending {
    pub(crate) exit: Exit,
    pub(crate) object: Value,
}

impl Ending {
    pub(crate) fn new(outcome: &str) -> Self {
        Self::with(Exit::Done, json!({ "outcome": outcome }))
    }

    pub(crate) fn with(exit: Exit, mut object: Value) -> Self {
        object["exit"] = json!(exit);
        Self { exit, object }
    }
}

/// Holds what a command was given besides its own arguments.
pub(crate) struct Session {
    pub(crate) console: Console,
    global: Global,
}

/// Knows the kinds of every adapter that is built in.
pub(crate) fn registry() -> Registry {
    let mut registry = Registry::new();
    #[cfg(feature = "host")]
    upgrade_host::register(&mut registry);
    #[cfg(feature = "postgres")]
    upgrade_postgres::register(&mut registry);
    registry
}

/// Runs a command that drives a run: on threads of its own, so that a step that blocks keeps
/// neither Ctrl-C nor its siblings waiting.
pub(crate) fn drive<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    block_on(tokio::runtime::Builder::new_multi_thread().enable_all().build(), work)
}

/// Runs a command that only looks: on this thread, which starts quicker.
pub(crate) fn look<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    block_on(tokio::runtime::Builder::new_current_thread().enable_all().build(), work)
}

fn block_on<T>(runtime: std::io::Result<tokio::runtime::Runtime>, work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = runtime.map_err(|error| Failure::internal("the runtime cannot be started").with_cause(&error))?;
    let result = runtime.block_on(work);
    // A call that never returned must not keep the process: what it left is settled on resume.
    runtime.shutdown_background();
    result
}

impl Session {
    pub(crate) fn new(global: Global) -> Self {
        Self { console: Console::new(&global), global }
    }

    /// Finds the directory of the journal.
    pub(crate) fn directory(&self) -> Result<PathBuf> {
        let Some(url) = &self.global.journal else { return Ok(self.global.state_dir.clone()) };
        match url.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(PathBuf::from(path.strip_prefix("//").unwrap_or(path))),
            Some((scheme, _)) if scheme != "file" => {
                Err(Failure::usage(format!("no adapter that keeps a journal at `{scheme}:` is built in"))
                    .with_hint("this command keeps its journal in files: --journal file:DIR, or --state-dir DIR"))
            }
            _ => Err(Failure::usage(format!("`{url}` is not a journal")).with_hint("write it file:DIR")),
        }
    }

    /// Opens the journal, making it where there is none.
    pub(crate) fn journal(&self) -> Result<Arc<FileJournal>> {
        let journal = FileJournal::open(self.directory()?)?;
        let journal = match std::env::var("UPGRADE_SEAL_KEY") {
            Ok(key) if !key.is_empty() => journal.with_key(&key)?,
            _ => journal,
        };
        Ok(Arc::new(journal))
    }

    /// Opens the journal if there is one: looking must not leave a directory behind.
    pub(crate) fn existing_journal(&self) -> Result<Option<Arc<FileJournal>>> {
        if self.directory()?.is_dir() { self.journal().map(Some) } else { Ok(None) }
    }

    /// Opens the journal for a command that needs a run in it.
    pub(crate) fn journal_with_runs(&self) -> Result<Arc<FileJournal>> {
        self.existing_journal()?.ok_or_else(|| {
            Failure::usage(format!("there is no journal in {}", self.global.state_dir.display()))
                .with_hint("`upgrade run FILE` makes one; --state-dir names another place")
        })
    }

    /// Loads a pipeline file with what is laid over it.
    pub(crate) fn load(&self, given: &PipelineFile) -> Result<Pipeline> {
        load(&given.file, &given.overlay.load_options())
    }

    /// Makes what drives a run, tells its story and listens to Ctrl-C.
    pub(crate) fn driver(&self, journal: Arc<dyn Journal>, base_dir: &Path) -> Result<Driver> {
        let narrator = Narrator::new(self.console);
        let curtain = narrator.curtain();
        let executor = Executor::new(journal).with_secrets(Secrets::new(base_dir)).observer(narrator);
        let interrupt = Interrupt::new();
        let listening = interruption::listen(interrupt.clone(), self.console)?;
        Ok(Driver { executor, interrupt, curtain, listening })
    }

    /// Tells how a run ended or why it waits.
    pub(crate) fn end(&self, report: &Report, title: &Title, asked: Asked) -> Result<Ending> {
        self.console.line(ending::text(report, title, self.console.out()))?;
        let object = serde_json::to_value(report).map_err(std::io::Error::from)?;
        Ok(Ending::with(Exit::of(&report.outcome, asked), object))
    }
}

/// Loads a pipeline file.
pub(crate) fn load(path: &Path, options: &file::LoadOptions) -> Result<Pipeline> {
    Ok(file::load(path, options, &registry())?)
}

/// Finds the directory that a pipeline file's relative paths start from.
pub(crate) fn base_dir(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Drives one run.
pub(crate) struct Driver {
    pub(crate) executor: Executor,
    pub(crate) interrupt: Interrupt,
    curtain: Curtain,
    listening: Listening,
}

impl Driver {
    /// Ends the drawing, and gives Ctrl-C back, before the result is told.
    pub(crate) fn finish<T>(self, result: Result<T, ExecutorError>) -> Result<T> {
        drop(self.executor);
        drop(self.curtain);
        drop(self.listening);
        Ok(result?)
    }
}
