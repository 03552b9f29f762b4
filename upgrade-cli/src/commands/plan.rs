//! `upgrade plan`: shows what a run would change.

use std::sync::Arc;

use clap::Args;
use serde_json::json;
use upgrade_core::executor::Executor;
use upgrade_core::executor::plan::Plan as Planned;
use upgrade_core::journal::Journal;
use upgrade_core::journal::memory::MemoryJournal;
use upgrade_core::secret::Secrets;
use upgrade_core::verdict::Status;

use crate::arguments::PipelineFile;
use crate::exit::Exit;
use crate::failure::{Failure, Result};
use crate::render::plan;
use crate::session::{Ending, Session, base_dir, look};

const EXAMPLES: &str = "\
Examples:
  upgrade plan upgrade.yaml
  upgrade plan upgrade.yaml --env production --to 1.1.0
  upgrade plan upgrade.yaml --detailed-exitcode   # 10: there is something to do, 0: there is not

The exit status is 3 where a check or a step says now that the run would not succeed, and 7 where
another run or a rule would refuse it.";

/// Show what a run would change, what can be undone, and how long it takes; change nothing.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Plan {
    #[command(flatten)]
    pipeline: PipelineFile,
    /// Exit with 10 where there is something to do.
    #[arg(long)]
    detailed_exitcode: bool,
}

impl Plan {
    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        let pipeline = session.load(&self.pipeline)?;
        let plan = look(async {
            // Looking makes no directory: without one, there are no earlier runs to heed.
            let journal: Arc<dyn Journal> = match session.existing_journal().await? {
                Some(journal) => journal,
                None => Arc::new(MemoryJournal::new()),
            };
            let executor = Executor::new(journal).with_secrets(Secrets::new(base_dir(&self.pipeline.file)));
            Ok(executor.plan(&pipeline).await?)
        })?;
        session.console.line(plan::text(&plan, session.console.out()))?;
        session.console.object(&json!({ "plan": plan }))?;
        if let Some((message, hint)) = &plan.refused {
            let failure = Failure::refused(format!("a run would be refused: {message}"));
            return Err(match hint {
                Some(hint) => failure.with_hint(hint),
                None => failure,
            });
        }
        Ok(Ending::with(judge(&plan, self.detailed_exitcode), json!({ "outcome": "planned" })))
    }
}

fn judge(plan: &Planned, detailed: bool) -> Exit {
    let rejected = plan.checks.iter().any(|check| check.verdict.status >= Status::Unknown);
    if rejected || plan.is_hopeless() {
        Exit::Rejected
    } else if detailed && plan.has_changes() {
        Exit::Changes
    } else {
        Exit::Done
    }
}
