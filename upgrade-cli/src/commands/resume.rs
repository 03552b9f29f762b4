//! `upgrade resume`: goes on with a run that was held, stopped or cut off.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use upgrade_core::executor::RunOptions;
use upgrade_core::units::Span;

use crate::arguments::{OpenSelector, Overlay};
use crate::exit::Asked;
use crate::failure::{Failure, Result};
use crate::render::Title;
use crate::runs::open_run;
use crate::session::{Ending, Session, base_dir, drive, load};

const EXAMPLES: &str = "\
Examples:
  upgrade resume                                # the latest open run, from what its journal keeps
  upgrade resume 0193ab12
  upgrade resume --file upgrade.yaml --adopt    # go on with another definition, on record";

/// Go on with a run that was held, stopped or cut off by a crash.
///
/// The pipeline is built again from the journal; no file is needed. A run that was rolling back
/// goes on rolling back.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Resume {
    #[command(flatten)]
    selector: OpenSelector,
    /// Take the pipeline from this file.
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Go on though the file's definition is not the run's; the difference is journaled.
    #[arg(long, requires = "file")]
    adopt: bool,
    #[command(flatten)]
    overlay: Overlay,
    /// Wait for another driver; a day if no time is given.
    #[arg(long, value_name = "DURATION", num_args = 0..=1, default_missing_value = "1d")]
    wait: Option<Span>,
    /// Return when the upgrade is applied and verified; `upgrade watch` sees it through.
    #[arg(long)]
    detach: bool,
}

impl Resume {
    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        if self.file.is_none() && !self.overlay.is_empty() {
            return Err(Failure::usage("--env, --to and --var are laid over a file")
                .with_hint("name it with --file; without one the run goes on as its journal keeps it"));
        }
        let options = RunOptions {
            patience: self.wait.map_or(Duration::ZERO, |span| span.0),
            detach: self.detach,
            adopt: self.adopt,
        };
        drive(async {
            let (journal, recorded) = open_run(session, self.selector.run.as_deref()).await?;
            let (pipeline, base) = match &self.file {
                Some(file) => (load(file, &self.overlay.load_options())?, base_dir(file).to_owned()),
                None => (recorded.pipeline()?, recorded.base_dir()),
            };
            let driver = session.driver(journal, &base)?;
            let report = driver.executor.resume(&pipeline, recorded.run.id(), &options, &driver.interrupt).await;
            let report = driver.finish(report)?;
            session.end(&report, &Title::from(recorded.run.header()), Asked::Upgrade)
        })
    }
}
