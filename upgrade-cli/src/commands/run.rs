//! `upgrade run`: carries an upgrade out.

use std::time::Duration;

use clap::Args;
use upgrade_core::executor::RunOptions;
use upgrade_core::units::Span;

use crate::arguments::PipelineFile;
use crate::exit::Asked;
use crate::failure::Result;
use crate::recorded::Recorded;
use crate::render::Title;
use crate::session::{Ending, Session, base_dir, drive};

const EXAMPLES: &str = "\
Examples:
  upgrade run upgrade.yaml --to 1.1.0
  upgrade run upgrade.yaml --env production --wait 10m   # wait for a run on the same targets
  upgrade run upgrade.yaml --detach                      # leave the probation to `upgrade watch`
  upgrade run upgrade.yaml --output json | jq .outcome

Ctrl-C once stops after the running steps (6), twice cancels them and rolls back (4), three times
kills the process, after which `upgrade resume` goes on.";

/// Carry an upgrade out: it completes, or everything is back as it was.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Run {
    #[command(flatten)]
    pipeline: PipelineFile,
    /// Wait for another run on the same targets; a day if no time is given.
    #[arg(long, value_name = "DURATION", num_args = 0..=1, default_missing_value = "1d", require_equals = false)]
    wait: Option<Span>,
    /// Return when the upgrade is applied and verified; `upgrade watch` sees it through.
    #[arg(long)]
    detach: bool,
}

impl Run {
    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        let pipeline = session.load(&self.pipeline)?;
        let options = RunOptions {
            patience: self.wait.map_or(Duration::ZERO, |span| span.0),
            detach: self.detach,
            ..RunOptions::default()
        };
        drive(async {
            let journal = session.journal().await?;
            let driver = session.driver(journal.clone(), base_dir(&self.pipeline.file))?;
            let report = driver.executor.run(&pipeline, &options, &driver.interrupt).await;
            let report = driver.finish(report)?;
            // The journal knows the version found; how the run ended is told without it as well.
            let title = match Recorded::load(&*journal, &report.run).await {
                Ok(recorded) => Title::from(recorded.run.header()),
                Err(_) => Title::from(&pipeline),
            };
            session.end(&report, &title, Asked::Upgrade)
        })
    }
}
