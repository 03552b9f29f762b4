//! What the commands share: the journal, the kinds, the way to drive a run and to end it.

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use upgrade_core::executor::{Executor, ExecutorError, Interrupt, Report};
use upgrade_core::file;
use upgrade_core::journal::Journal;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::registry::Registry;
use upgrade_core::secret::Secrets;

use crate::arguments::{Global, PipelineFile};
use crate::console::Console;
use crate::exit::{Asked, Exit};
use crate::failure::{Failure, Result};
use crate::interruption::{self, Listening};
use crate::place::Place;
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
    #[cfg(feature = "docker")]
    upgrade_docker::register(&mut registry);
    #[cfg(feature = "host")]
    upgrade_host::register(&mut registry);
    #[cfg(feature = "k8s")]
    upgrade_k8s::register(&mut registry);
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

    /// Finds where the journal is.
    pub(crate) fn place(&self) -> Result<Place> {
        Place::of(&self.global)
    }

    /// Opens the journal, making it where there is none.
    pub(crate) async fn journal(&self) -> Result<Arc<dyn Journal>> {
        self.place()?.open().await
    }

    /// Opens the journal if there is one: looking must not leave anything behind.
    pub(crate) async fn existing_journal(&self) -> Result<Option<Arc<dyn Journal>>> {
        self.place()?.open_existing().await
    }

    /// Opens the journal if there is one, to read it; where its server does not answer, the copy of
    /// it that this machine has.
    pub(crate) async fn readable_journal(&self) -> Result<Option<Arc<dyn Journal>>> {
        self.place()?.open_readable(self.console).await
    }

    /// Opens the journal for a command that needs a run in it.
    pub(crate) async fn journal_with_runs(&self) -> Result<Arc<dyn Journal>> {
        self.existing_journal().await?.ok_or_else(|| self.no_journal())
    }

    /// Says that there is no journal yet.
    pub(crate) fn no_journal(&self) -> Failure {
        let place = self.place().map(|place| place.to_string()).unwrap_or_default();
        Failure::usage(format!("there is no journal in {place}"))
            .with_hint("`upgrade run FILE` makes one; --state-dir or --journal names another place")
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
