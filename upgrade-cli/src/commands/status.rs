//! `upgrade status`: shows where a run stands.

use clap::Args;
use serde_json::json;

use crate::arguments::Selector;
use crate::exit::Asked;
use crate::failure::Result;
use crate::recorded::{Recorded, Until, follow};
use crate::render::Title;
use crate::render::narrator::Narrator;
use crate::render::status::{self, Driver};
use crate::runs::{Default, choose};
use crate::session::{Ending, Session, look};

const EXAMPLES: &str = "\
Examples:
  upgrade status
  upgrade status 0193ab12 --output json
  upgrade status --watch     # follow it to its end; exits as `run` does

Without --watch the exit status is 0 wherever the run stands.";

/// Show where a run stands: its state, its steps, what it waits for.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Status {
    #[command(flatten)]
    selector: Selector,
    /// Follow the run until it is over or waits for an operator.
    #[arg(short, long)]
    watch: bool,
}

impl Status {
    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        look(async {
            let journal = session.readable_journal().await?.ok_or_else(|| session.no_journal())?;
            let chosen = choose(&*journal, self.selector.run.as_deref(), Default::Latest).await?;
            let recorded = Recorded::load(&*journal, &chosen.run).await?;
            if self.watch {
                let mut narrator = Narrator::new(session.console);
                let curtain = narrator.curtain();
                let report = follow(&journal, &chosen.run, 0, &mut narrator, Until::Settled).await;
                drop(curtain);
                return session.end(&report?, &Title::from(recorded.run.header()), Asked::Upgrade);
            }
            let driver = Driver::last(&recorded.records);
            session.console.line(status::text(&recorded.run, driver.as_ref(), session.console.out()))?;
            session.console.object(&json!({ "status": status::object(&recorded.run, driver.as_ref()) }))?;
            Ok(Ending::new("shown"))
        })
    }
}
