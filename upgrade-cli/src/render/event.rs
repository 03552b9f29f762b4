//! One line, or a few, for each thing that happens in a run.

use upgrade_core::context::Direction;
use upgrade_core::entry::{Cause, Demand, Entry, Phase, Record, Resolution};
use upgrade_core::error::StepError;
use upgrade_core::step::Change;
use upgrade_core::transition::RunState;
use upgrade_core::verdict::{Status, Verdict};

use super::palette::{Palette, harmless};
use super::plan;
use super::{Title, elapsed};
use crate::failure::chain;

/// Says what a record tells; `None` where only a verbose reader wants to know.
pub(crate) fn describe(record: &Record, palette: Palette, verbose: bool) -> Option<String> {
    let p = palette;
    Some(match &record.entry {
        Entry::RunCreated(header) => format!("{} · run {}", p.strong(Title::from(&**header)), header.run),
        // The first driver is the one that made the run.
        Entry::DriverAttached { actor, .. } if record.seq > 1 => format!("taken up by {actor}"),
        Entry::DefinitionAdopted { difference, actor, .. } => {
            let mut text = format!("{actor} adopted another definition:");
            difference.iter().for_each(|line| text += &format!("\n    {}", harmless(line)));
            text
        }
        Entry::RunEntered { state, cause, deadline, .. } => entered(*state, cause.as_ref(), *deadline, p),
        Entry::CheckReported { phase, check, verdict, .. } => {
            if *phase == Phase::Guard && verdict.status == Status::Pass && !verbose {
                return None;
            }
            let label =
                if *phase == Phase::Pre { String::new() } else { format!(" {}", p.faint(format_args!("({phase})"))) };
            answer(&format!("{}{label}", p.strong(check)), verdict, p)
        }
        Entry::GuardChanged { guard, breached: true, verdict, .. } => {
            answer(&format!("guard {} is broken", p.strong(guard)), verdict, p)
        }
        Entry::GuardChanged { guard, .. } => format!("  {} guard {} is kept again", p.good("✓"), p.strong(guard)),
        Entry::StepPrepared { step, changes, .. } => prepared(step.as_str(), changes, p, verbose),
        Entry::StepUnchanged { step, reason, .. } => {
            format!("  {} {}: unchanged: {}", p.faint("="), p.strong(step), harmless(reason))
        }
        Entry::StepSkipped { step, reason } => {
            format!("  {} {}: skipped: {}", p.faint("-"), p.strong(step), harmless(reason))
        }
        Entry::StepFailed { step, direction, attempt, error, retry_at, .. } => {
            let what = match direction {
                Direction::Forward => "failed",
                Direction::Back => "could not be undone",
                Direction::Commit => "could not be committed",
            };
            let mark = if retry_at.is_some() { p.careful("!").to_string() } else { p.bad("✗").to_string() };
            let again = retry_at.map_or(String::new(), |at| format!(" (attempt {attempt}; again at {})", clock(at)));
            format!("  {mark} {} {what}{again}: {}", p.strong(step), failed(error, p))
        }
        Entry::StepApplied { step, elapsed_ms, .. } => {
            format!("  {} {} {}", p.good("✓"), p.strong(step), p.faint(elapsed(*elapsed_ms)))
        }
        Entry::StepUndoing { step } => format!("  {} {}: undoing", p.accent("◂"), p.strong(step)),
        Entry::StepUndone { step, elapsed_ms } => {
            format!("  {} {}: undone {}", p.good("↩"), p.strong(step), p.faint(elapsed(*elapsed_ms)))
        }
        Entry::StepResolved { step, resolution, actor, reason } => {
            let decision = match resolution {
                Resolution::Retry => "undo it again",
                Resolution::Skip => "it was put back by hand",
                Resolution::Abandon => "it stays as it is",
            };
            format!("  {} {}: {actor} decided: {decision}: {}", p.careful("!"), p.strong(step), harmless(reason))
        }
        Entry::RequestReceived { request } => {
            let what = match &request.demand {
                Demand::Stop { reason } => format!("to stop: {}", harmless(reason)),
                Demand::Rollback { reason } => format!("to roll back: {}", harmless(reason)),
                Demand::Confirm { reason } => format!("to commit: {}", harmless(reason)),
                Demand::Resume => "to go on".to_owned(),
                Demand::Resolve { step, .. } => format!("to decide about `{step}`"),
            };
            format!("{} asks {what}", request.actor)
        }
        Entry::RequestAnswered { refused: Some(why), .. } => format!("the request was refused: {}", harmless(why)),
        Entry::BudgetAlarm { message } => format!("{} {}", p.careful("!"), harmless(message)),
        Entry::TargetIdentified { target, identity } if verbose => format!("  {target} is {}", harmless(identity)),
        Entry::StepCheckpoint { step, .. } if verbose => format!("  {step}: checkpoint"),
        Entry::StepCommitted { step } if verbose => format!("  {} {}: committed", p.good("✓"), p.strong(step)),
        Entry::DriverAttached { .. }
        | Entry::TargetIdentified { .. }
        | Entry::StepCheckpoint { .. }
        | Entry::StepCommitted { .. }
        | Entry::RequestAnswered { refused: None, .. } => return None,
    })
}

fn entered(state: RunState, cause: Option<&Cause>, deadline: Option<jiff::Timestamp>, p: Palette) -> String {
    let name = match state {
        RunState::RollingBack | RunState::Held | RunState::RolledBack => p.careful(state).to_string(),
        RunState::Stuck | RunState::Rejected | RunState::Abandoned => p.bad(state).to_string(),
        RunState::Committed => p.good(state).to_string(),
        _ => p.accent(state).to_string(),
    };
    match (cause, deadline) {
        (Some(cause), _) => format!("{name}: {}", harmless(&cause.to_string())),
        (None, Some(deadline)) if state == RunState::Probation => format!("{name} until {}", clock(deadline)),
        (None, _) => name,
    }
}

fn answer(subject: &str, verdict: &Verdict, p: Palette) -> String {
    let mut text = format!("  {} {subject}: {}", mark(verdict.status, p), harmless(&verdict.message));
    if verdict.status != Status::Pass {
        chain(&mut text, p, &[], None, verdict.hint.as_deref());
    }
    text
}

/// Returns the sign of a verdict.
pub(crate) fn mark(status: Status, p: Palette) -> String {
    match status {
        Status::Pass => p.good("✓").to_string(),
        Status::Warn => p.careful("!").to_string(),
        Status::Unknown => p.careful("?").to_string(),
        Status::Fail => p.bad("✗").to_string(),
    }
}

fn prepared(step: &str, changes: &[Change], p: Palette, verbose: bool) -> String {
    let mut text = format!("  {} {}: applying", p.accent("▸"), p.strong(step));
    if verbose {
        changes.iter().for_each(|change| text += &format!("\n{}", plan::change(change, p)));
    }
    text
}

/// Renders what a step said when it failed, its chain and its hint below it.
pub(crate) fn failed(error: &StepError, p: Palette) -> String {
    let mut text = harmless(error.message());
    chain(&mut text, p, error.causes(), error.detail(), error.hint());
    text
}

/// Writes an instant in UTC, to the second.
pub(crate) fn clock(at: jiff::Timestamp) -> String {
    let whole = jiff::Timestamp::from_second(at.as_second()).unwrap_or(at);
    whole.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(entry: Entry) -> Record {
        Record { seq: 5, at: jiff::Timestamp::UNIX_EPOCH, prev: String::new(), entry, digest: String::new() }
    }

    fn plain(entry: Entry) -> Option<String> {
        describe(&record(entry), Palette::new(false), false)
    }

    #[test]
    fn a_failed_step_shows_its_hint() {
        let error = StepError::transient("the server is away").with_hint("start it");
        let entry = Entry::StepFailed {
            step: "schema".parse().unwrap(),
            direction: Direction::Back,
            attempt: 2,
            error,
            retry_at: None,
            elapsed_ms: 3,
        };
        assert_eq!(plain(entry).unwrap(), "  ✗ schema could not be undone: the server is away\n  hint: start it");
    }

    #[test]
    fn a_guard_that_passes_is_not_news() {
        let entry = |phase| Entry::CheckReported {
            phase,
            check: "probe".parse().unwrap(),
            verdict: Verdict::pass("fine"),
            elapsed_ms: 1,
        };
        assert_eq!(plain(entry(Phase::Guard)), None);
        assert_eq!(plain(entry(Phase::Pre)).unwrap(), "  ✓ probe: fine");
    }

    #[test]
    fn instants_end_at_the_second() {
        assert_eq!(clock(jiff::Timestamp::UNIX_EPOCH), "1970-01-01T00:00:00Z");
    }
}
