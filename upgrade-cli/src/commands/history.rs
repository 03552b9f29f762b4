//! `upgrade history`: lists the runs.

use clap::Args;
use comfy_table::Table;
use comfy_table::presets::NOTHING;
use serde_json::json;
use upgrade_core::journal::RunSummary;

use crate::failure::Result;
use crate::render::{elapsed, event::clock};
use crate::runs::short_length;
use crate::session::{Ending, Session, look};

const EXAMPLES: &str = "\
Examples:
  upgrade history
  upgrade history --output json | jq 'select(.run) | .run.state'";

/// List the runs, the latest last: state, versions, environment, duration.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct History {}

impl History {
    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        let runs = look(async {
            match session.readable_journal().await? {
                Some(journal) => Ok(journal.runs().await?),
                None => Ok(Vec::new()),
            }
        })?;
        if runs.is_empty() {
            session.console.line("no runs yet")?;
        } else {
            session.console.line(table(&runs))?;
        }
        for run in &runs {
            session.console.object(&json!({ "run": run }))?;
        }
        Ok(Ending::new("listed"))
    }
}

fn table(runs: &[RunSummary]) -> String {
    let length = short_length(runs.iter().map(|run| run.run.as_str()));
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(["RUN", "UPGRADE", "FROM", "TO", "ENVIRONMENT", "STATE", "BEGUN", "TOOK"]);
    for run in runs {
        let text = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        let took = match (run.created, run.updated) {
            (Some(created), Some(updated)) => u64::try_from(updated.duration_since(created).as_millis()).ok(),
            _ => None,
        };
        table.add_row([
            run.run.as_str().chars().take(length).collect(),
            text(run.pipeline.as_ref().map(ToString::to_string)),
            text(run.from.as_ref().map(ToString::to_string)),
            text(run.to.as_ref().map(ToString::to_string)),
            text(run.environment.clone()),
            match (&run.damage, run.state) {
                (Some(damage), _) => format!("damaged: {damage}"),
                (None, state) => text(state.map(|state| state.to_string())),
            },
            text(run.created.map(clock)),
            text(took.map(elapsed)),
        ]);
    }
    table.trim_fmt()
}
