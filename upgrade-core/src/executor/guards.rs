//! Checks repeated while the run goes on, and what follows when a limit stays broken.

use std::collections::BTreeMap;

use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use super::calls::{Ask, Caller};
use super::decide::is_watching;
use super::state::Run;
use crate::entry::{Entry, GuardAction, Phase};
use crate::names::CheckId;
use crate::pipeline::Pipeline;
use crate::verdict::{Status, Verdict};

/// How many unknown verdicts in a row hold the run.
const UNKNOWN_IN_A_ROW: u32 = 3;

/// Carries one answer of a guard to the driver.
pub(crate) struct Sample {
    pub(crate) guard: CheckId,
    pub(crate) verdict: Verdict,
    pub(crate) at: Instant,
}

#[derive(Default)]
struct Watch {
    failing_since: Option<Instant>,
    unknown: u32,
    breached: bool,
}

/// Keeps a task for every guard that is watching, and judges what they see.
pub(crate) struct Guards {
    samples: mpsc::UnboundedSender<Sample>,
    tasks: BTreeMap<CheckId, (JoinHandle<()>, CancellationToken)>,
    watches: BTreeMap<CheckId, Watch>,
}

impl Guards {
    pub(crate) fn new(samples: mpsc::UnboundedSender<Sample>) -> Self {
        Self { samples, tasks: BTreeMap::new(), watches: BTreeMap::new() }
    }

    /// Starts and ends guards as the state of the run asks.
    pub(crate) fn watch(&mut self, pipeline: &Pipeline, run: &Run, caller: &Caller) {
        for guard in &pipeline.guards {
            let id = &guard.check.id;
            match (is_watching(guard, pipeline, run), self.tasks.contains_key(id)) {
                (true, false) => {
                    let cancelled = CancellationToken::new();
                    // A context that cannot be made is one without its step: guards have none.
                    let Ok(ask) = Ask::new(caller, guard.check.clone(), &Phase::Guard, run, &cancelled) else {
                        continue;
                    };
                    let (samples, id, every) = (self.samples.clone(), id.clone(), guard.every.0);
                    let task = tokio::spawn(async move {
                        loop {
                            let verdict = ask.once().await;
                            if samples.send(Sample { guard: id.clone(), verdict, at: Instant::now() }).is_err() {
                                return;
                            }
                            sleep(every).await;
                        }
                    });
                    self.tasks.insert(guard.check.id.clone(), (task, cancelled));
                }
                (false, true) => {
                    self.end(id);
                    self.watches.remove(id);
                }
                _ => {}
            }
        }
    }

    /// Says what follows from an answer; nothing for one that changes nothing.
    pub(crate) fn judge(&mut self, pipeline: &Pipeline, run: &Run, sample: &Sample) -> Option<Entry> {
        let guard = pipeline.guards.iter().find(|guard| guard.check.id == sample.guard)?;
        if !is_watching(guard, pipeline, run) {
            return None;
        }
        let watch = self.watches.entry(sample.guard.clone()).or_default();
        let changed = |breached, action| {
            Some(Entry::GuardChanged { guard: sample.guard.clone(), breached, action, verdict: sample.verdict.clone() })
        };
        match sample.verdict.status {
            Status::Unknown => {
                watch.unknown += 1;
                // Nobody knows whether the limit is kept: whatever the action, a person must look.
                (watch.unknown == UNKNOWN_IN_A_ROW).then(|| changed(true, GuardAction::Hold)).flatten()
            }
            Status::Fail => {
                watch.unknown = 0;
                let since = *watch.failing_since.get_or_insert(sample.at);
                let breached = sample.at.duration_since(since) >= guard.breach_for.0;
                let news = breached && !watch.breached;
                watch.breached |= breached;
                if news { changed(true, guard.action) } else { None }
            }
            Status::Pass | Status::Warn => {
                let was = std::mem::take(watch).breached;
                if was { changed(false, guard.action) } else { None }
            }
        }
    }

    fn end(&mut self, id: &CheckId) {
        if let Some((task, cancelled)) = self.tasks.remove(id) {
            cancelled.cancel();
            task.abort();
        }
    }

    /// Ends every guard.
    pub(crate) fn stop(&mut self) {
        for id in self.tasks.keys().cloned().collect::<Vec<_>>() {
            self.end(&id);
        }
    }
}

impl Drop for Guards {
    fn drop(&mut self) {
        self.stop();
    }
}
