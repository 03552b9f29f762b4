//! `upgrade watch`: sees runs through that nobody drives, also after a reboot.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use upgrade_core::entry::Demand;
use upgrade_core::executor::{Answer, Executor, ExecutorError, Interrupt, Report, RunOptions};
use upgrade_core::journal::{Journal, JournalError, RunSummary};
use upgrade_core::names::RunId;
use upgrade_core::secret::Secrets;
use upgrade_core::transition::RunState;
use upgrade_core::units::Span;

use crate::console::{Console, document};
use crate::exit::{Asked, Exit};
use crate::failure::{Failure, Result};
use crate::recorded::Recorded;
use crate::render::narrator::Narrator;
use crate::render::{Title, ending};
use crate::session::{Ending, Session, drive};

const EXAMPLES: &str = "\
Examples:
  upgrade watch                                  # until it is stopped
  upgrade watch --on-interrupted rollback
  upgrade watch --once                           # see through what is open now
  upgrade watch --unit | sudo tee /etc/systemd/system/upgrade-watch.service

It drives what nobody drives: probations to their end, commits, rollbacks, and what a crash cut
off. Runs that are held or stuck are the operator's. Ctrl-C and SIGTERM end it at once; what it
drove goes on when it is started again.";

/// How long a run that could not be driven is left alone: what failed once would fill the log.
const AGAIN: Duration = Duration::from_secs(60);

/// See runs through that nobody drives: probations, commits, rollbacks, what a crash cut off.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Watch {
    /// What becomes of a run that a crash cut off before it was applied and verified.
    #[arg(long, value_name = "WHAT", default_value = "resume")]
    on_interrupted: OnInterrupted,
    /// How often the journal is looked at.
    #[arg(long, value_name = "DURATION", default_value = "2s")]
    every: Span,
    /// See through what is open now, and return.
    #[arg(long)]
    once: bool,
    /// Print a systemd unit that runs this, and return.
    #[arg(long)]
    unit: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnInterrupted {
    /// It goes on where it was.
    Resume,
    /// It is put back.
    Rollback,
    /// It is left to the operator.
    Leave,
}

/// Says what to do about a run that nobody drives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Resume,
    Rollback,
    Nothing,
}

fn action(state: Option<RunState>, on_interrupted: OnInterrupted) -> Action {
    match state {
        Some(RunState::Probation | RunState::Committing | RunState::RollingBack) => Action::Resume,
        Some(RunState::Checking | RunState::Applying | RunState::Verifying) => match on_interrupted {
            OnInterrupted::Resume => Action::Resume,
            OnInterrupted::Rollback => Action::Rollback,
            OnInterrupted::Leave => Action::Nothing,
        },
        // A held or stuck run waits for a person; of a damaged one nothing is known.
        _ => Action::Nothing,
    }
}

impl Watch {
    pub(crate) fn is_document(&self) -> bool {
        self.unit
    }

    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        if self.unit {
            document(unit(session)?.as_bytes())?;
            return Ok(Ending::new("printed"));
        }
        drive(self.watch(session))
    }

    async fn watch(self, session: &Session) -> Result<Ending> {
        let journal = session.journal().await?;
        let (mut ctrl_c, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        let mut watched =
            Watched { console: session.console, drivers: JoinSet::new(), runs: BTreeMap::new(), worst: Exit::Done };
        loop {
            for summary in journal.runs().await? {
                match action(summary.state, self.on_interrupted) {
                    Action::Nothing => {}
                    action => watched.take(&journal, summary, action),
                }
            }
            if self.once {
                watched.all_ended().await;
                return Ok(Ending::with(watched.worst, json!({ "outcome": "watched" })));
            }
            tokio::select! {
                () = tokio::time::sleep(self.every.0) => {}
                () = watched.one_ended() => {}
                // A hold would be the operator's, and stay after a reboot: what is driven is left
                // as a crash leaves it, and goes on when this is started again.
                _ = ctrl_c.recv() => return Ok(Ending::new("watched")),
                _ = terminate.recv() => return Ok(Ending::new("watched")),
            }
        }
    }
}

/// Holds the runs that are seen through.
struct Watched {
    console: Console,
    drivers: JoinSet<(RunId, Result<Option<Report>>)>,
    /// Those that are driven, and those that could not be, with the time of the next attempt.
    runs: BTreeMap<RunId, Option<Instant>>,
    worst: Exit,
}

impl Watched {
    fn take(&mut self, journal: &Arc<dyn Journal>, summary: RunSummary, action: Action) {
        match self.runs.get(&summary.run) {
            Some(None) => return,
            Some(Some(next)) if Instant::now() < *next => return,
            _ => {}
        }
        self.runs.insert(summary.run.clone(), None);
        let (journal, console) = (journal.clone(), self.console);
        self.drivers.spawn(async move {
            let report = see_through(journal, &summary, action, console).await;
            (summary.run, report)
        });
    }

    async fn all_ended(&mut self) {
        while !self.drivers.is_empty() {
            self.one_ended().await;
        }
    }

    /// Waits for one run to end; for ever if none is driven.
    async fn one_ended(&mut self) {
        let exit = match self.drivers.join_next().await {
            None => std::future::pending().await,
            Some(Ok((run, Ok(report)))) => {
                self.runs.remove(&run);
                report.map_or(Exit::Done, |report| Exit::of(&report.outcome, Asked::Upgrade))
            }
            Some(Ok((run, Err(failure)))) => {
                self.console.alarm(format_args!("run {run}: {}", failure.text(self.console.err())));
                self.runs.insert(run, Some(Instant::now() + AGAIN));
                failure.exit
            }
            Some(Err(error)) => {
                let failure = Failure::internal("a run's driver ended early").with_cause(&error);
                self.console.alarm(failure.text(self.console.err()));
                failure.exit
            }
        };
        self.worst = self.worst.max(exit);
    }
}

/// Drives one run to its end; `None` where somebody else does.
async fn see_through(
    journal: Arc<dyn Journal>,
    summary: &RunSummary,
    action: Action,
    console: Console,
) -> Result<Option<Report>> {
    // What somebody drives was not cut off: a demand would turn it back.
    match journal.acquire(&summary.locks, Duration::ZERO).await {
        Ok(lease) => drop(lease),
        Err(JournalError::Held { .. }) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let recorded = Recorded::load(&*journal, &summary.run).await?;
    if Some(recorded.run.state()) != summary.state {
        return Ok(None);
    }
    let pipeline = recorded.pipeline()?;
    let executor =
        Executor::new(journal).with_secrets(Secrets::new(&recorded.base_dir())).observer(Narrator::of_several(console));
    let (options, interrupt) = (RunOptions::default(), Interrupt::new());
    let report = match action {
        Action::Rollback => {
            let demand = Demand::Rollback { reason: "cut off, and watched with --on-interrupted rollback".into() };
            match executor.demand(&pipeline, &summary.run, demand, &options, &interrupt).await {
                Ok(Answer::Driven(report)) => Ok(report),
                Ok(_) => return Ok(None),
                Err(error) => Err(error),
            }
        }
        _ => executor.resume(&pipeline, &summary.run, &options, &interrupt).await,
    };
    match report {
        Ok(report) => {
            console.line(ending::text(&report, &Title::from(recorded.run.header()), console.out()))?;
            console.object(&json!({ "report": report }))?;
            Ok(Some(report))
        }
        Err(ExecutorError::Journal(JournalError::Held { .. })) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn unit(session: &Session) -> Result<String> {
    let command = std::env::current_exe()
        .map_err(|error| Failure::internal("cannot tell where this program is").with_cause(&error))?;
    let place = session.place()?.arguments()?;
    let place: Vec<String> = place.iter().map(|word| quoted(word)).collect();
    Ok(format!(
        "[Unit]\n\
         Description=Sees upgrades through: probations, commits, rollbacks, what a crash cut off\n\
         Documentation=man:upgrade(1)\n\
         After=network-online.target\n\
         Wants=network-online.target\n\
         \n\
         [Service]\n\
         {environment}ExecStart={command} {place} watch\n\
         Restart=always\n\
         RestartSec=5\n\
         \n\
         [Install]\n\
         WantedBy=multi-user.target\n",
        command = quoted(&command.display().to_string()),
        place = place.join(" "),
        // What may not stand in a unit, which anybody can read: PGPASSWORD, UPGRADE_SEAL_KEY.
        environment = if session.place()?.is_remote() { "EnvironmentFile=-/etc/upgrade/environment\n" } else { "" },
    ))
}

/// Quotes a word as systemd reads it.
fn quoted(word: &str) -> String {
    let escaped = word.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    if escaped.contains(|c: char| c.is_whitespace() || c == '"' || c == '\'') {
        format!("\"{escaped}\"")
    } else {
        escaped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_for_a_person_is_left_alone() {
        for state in RunState::ALL {
            let expected = match state {
                RunState::Probation | RunState::Committing | RunState::RollingBack => Action::Resume,
                RunState::Checking | RunState::Applying | RunState::Verifying => Action::Rollback,
                _ => Action::Nothing,
            };
            assert_eq!(action(Some(*state), OnInterrupted::Rollback), expected, "{state}");
        }
        assert_eq!(action(Some(RunState::Applying), OnInterrupted::Leave), Action::Nothing);
        assert_eq!(action(None, OnInterrupted::Resume), Action::Nothing);
    }

    #[test]
    fn a_unit_names_odd_paths_as_they_are() {
        assert_eq!(quoted("/srv/a b/100%"), "\"/srv/a b/100%%\"");
        assert_eq!(quoted("/usr/bin/upgrade"), "/usr/bin/upgrade");
    }
}
