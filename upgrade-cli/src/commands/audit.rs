//! `upgrade audit`: proves the journal whole, and hands it out.

use clap::{Args, Subcommand};
use serde_json::json;
use upgrade_core::journal::{Journal, RunSummary};

use crate::console::{Console, raw_object};
use crate::exit::Exit;
use crate::failure::Result;
use crate::render::narrator::Line;
use crate::runs::{Default, choose};
use crate::session::{Ending, Session, look};

const EXAMPLES: &str = "\
Examples:
  upgrade audit verify             # every run; 1 and each damaged line if one is not whole
  upgrade audit verify 0193ab12
  upgrade audit export > audit.jsonl";

/// Prove the journal whole, or hand it out: the audit log is the journal.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Audit {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Verify every digest and its place in the chain; exits 1 and names each damaged line.
    #[command(after_help = EXAMPLES)]
    Verify(AllSelector),
    /// Write the records of a run, or of all, to stdout: one JSON object a line.
    #[command(after_help = EXAMPLES)]
    Export(AllSelector),
}

/// A run, or all of them.
#[derive(Debug, Args)]
struct AllSelector {
    /// The run, or the first characters of its id; every run if absent.
    #[arg(value_name = "RUN")]
    run: Option<String>,
}

impl Audit {
    pub(crate) fn is_document(&self) -> bool {
        matches!(self.what, What::Export(_))
    }

    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        look(async {
            let Some(journal) = session.readable_journal().await? else {
                session.console.line("no runs yet")?;
                return Ok(Ending::new("whole"));
            };
            let (What::Verify(selector) | What::Export(selector)) = &self.what;
            let runs = match &selector.run {
                Some(run) => vec![choose(&*journal, Some(run), Default::Latest).await?],
                None => journal.runs().await?,
            };
            match &self.what {
                What::Verify(_) => verify(session.console, &*journal, &runs).await,
                What::Export(_) => export(&*journal, &runs).await,
            }
        })
    }
}

async fn verify(console: Console, journal: &dyn Journal, runs: &[RunSummary]) -> Result<Ending> {
    let mut damaged = 0;
    for run in runs {
        let faults = journal.verify(&run.run).await?;
        let broken = faults.iter().any(|fault| !fault.harmless);
        damaged += u32::from(broken);
        console.object(&json!({ "run": run.run, "entries": run.entries, "whole": !broken, "faults": faults }))?;
        if faults.is_empty() {
            console.line(format_args!(
                "{} run {}: whole, {} entries",
                console.out().good("✓"),
                run.run,
                run.entries
            ))?;
        }
        for fault in &faults {
            let mark = if fault.harmless {
                console.out().careful("!").to_string()
            } else {
                console.out().bad("✗").to_string()
            };
            console.line(format_args!("{mark} run {}, line {}: {}", run.run, fault.line, fault.reason))?;
        }
    }
    let (exit, outcome) = if damaged > 0 { (Exit::Internal, "damaged") } else { (Exit::Done, "whole") };
    Ok(Ending::with(exit, json!({ "outcome": outcome, "runs": runs.len(), "damaged": damaged })))
}

async fn export(journal: &dyn Journal, runs: &[RunSummary]) -> Result<Ending> {
    for run in runs {
        for record in journal.load(&run.run).await? {
            raw_object(&Line { run: &run.run, record: &record })?;
        }
    }
    Ok(Ending::new("exported"))
}
