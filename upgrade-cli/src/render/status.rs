//! Where a run stands: its state, its steps, who drives it.

use comfy_table::presets::NOTHING;
use comfy_table::{Cell, Table};
use serde_json::{Value, json};
use upgrade_core::entry::{Entry, Record};
use upgrade_core::executor::state::Run;
use upgrade_core::names::{Actor, StepId};
use upgrade_core::transition::{RunState, StepState};
use upgrade_core::verdict::Status;

use super::event::{clock, failed, mark};
use super::palette::{Palette, harmless};
use super::{Title, elapsed};

/// Names who drove a run last, and whether that process is still there, as far as this machine
/// can tell.
pub(crate) struct Driver {
    actor: Actor,
    alive: Option<bool>,
}

impl Driver {
    /// Finds the last driver in a run's records.
    pub(crate) fn last(records: &[Record]) -> Option<Self> {
        let actor = records.iter().rev().find_map(|record| match &record.entry {
            Entry::DriverAttached { actor, .. } => Some(actor.clone()),
            _ => None,
        })?;
        // Asked of the system and not of the lease: a status must not stand in a driver's way.
        let here = actor.host == Actor::current().host;
        let pid = i32::try_from(actor.pid).ok().and_then(rustix::process::Pid::from_raw);
        let alive = pid.filter(|_| here).map(|pid| match rustix::process::test_kill_process(pid) {
            Ok(()) => true,
            Err(error) => error == rustix::io::Errno::PERM,
        });
        Some(Self { actor, alive })
    }
}

/// Tells whether somebody has to be driving a run in this state.
fn is_driven(state: RunState) -> bool {
    !state.is_final() && !matches!(state, RunState::Held | RunState::Stuck)
}

/// Renders a run for a person.
pub(crate) fn text(run: &Run, driver: Option<&Driver>, p: Palette) -> String {
    let state = run.state();
    let mut text = format!("{} · run {}\n", p.strong(Title::from(run.header())), run.id());
    text += &painted(state, p);
    if let Some(from) = run.held_from() {
        text += &format!(" while {from}");
    }
    if state == RunState::Probation
        && let Some(deadline) = run.deadline()
    {
        text += &format!(" until {}", clock(deadline));
    }
    text += &format!(" · begun {} · last entry {}\n", clock(run.created_at()), clock(run.updated_at()));
    if let Some(cause) = run.cause() {
        text += &format!("because: {}\n", harmless(&cause.to_string()));
    }
    if let Some(driver) = driver.filter(|_| is_driven(state)) {
        text += &match driver.alive {
            Some(false) if state == RunState::Probation => {
                format!("{} nobody watches it: `upgrade watch` sees it through\n", p.careful("!"))
            }
            Some(false) => format!(
                "{} nobody drives it: {} is gone; `upgrade resume` or `upgrade rollback`\n",
                p.bad("✗"),
                driver.actor
            ),
            _ => format!("driven by {}\n", driver.actor),
        };
    }
    text += &format!("\n{}\n", steps(run));
    for ((phase, check), verdict) in run.checks().iter().filter(|(_, verdict)| verdict.status != Status::Pass) {
        text += &format!("{} {phase} {check}: {}\n", mark(verdict.status, p), harmless(&verdict.message));
    }
    for (step, error) in run.steps().iter().filter_map(|(id, step)| Some((id, step.error()?))) {
        text += &format!("{} {step}: {}\n", p.bad("✗"), failed(error, p));
    }
    text.trim_end().to_owned()
}

fn painted(state: RunState, p: Palette) -> String {
    match state {
        RunState::Committed => p.good(state).to_string(),
        RunState::Stuck | RunState::Rejected | RunState::Abandoned => p.bad(state).to_string(),
        RunState::Held | RunState::RollingBack | RunState::RolledBack => p.careful(state).to_string(),
        _ => p.accent(state).to_string(),
    }
}

/// Lists the steps in the order of the pipeline, those that no entry speaks of too.
fn order(run: &Run) -> Vec<StepId> {
    let shape = run.definition().shape.get("steps").and_then(Value::as_object);
    let named = shape.map(|steps| steps.keys().filter_map(|id| id.parse().ok()).collect::<Vec<StepId>>());
    named.unwrap_or_else(|| run.steps().keys().cloned().collect())
}

fn steps(run: &Run) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(["STEP", "KIND", "STATE", "TRIES", "TOOK"]);
    for id in order(run) {
        let state = run.step_state(&id);
        let step = run.steps().get(&id);
        let kind = run.definition().shape.pointer(&format!("/steps/{id}/kind")).and_then(Value::as_str).unwrap_or("?");
        // No colours here: the table would count them as width.
        let sign = match state {
            StepState::Applied | StepState::Committed => "✓",
            StepState::Undone => "↩",
            StepState::UndoFailed | StepState::Abandoned => "✗",
            StepState::Prepared | StepState::Undoing => "▸",
            StepState::Pending | StepState::Unchanged | StepState::Skipped => "·",
        };
        let tries = step.map_or(0, |step| step.tries());
        table.add_row([
            Cell::new(&id),
            Cell::new(kind),
            Cell::new(format!("{sign} {state}")),
            Cell::new(if tries > 0 { tries.to_string() } else { String::new() }),
            Cell::new(step.and_then(|step| step.elapsed_ms()).map_or(String::new(), elapsed)),
        ]);
    }
    table.trim_fmt();
    table.trim_fmt()
}

/// Describes a run for a program.
pub(crate) fn object(run: &Run, driver: Option<&Driver>) -> Value {
    let header = run.header();
    let steps: serde_json::Map<String, Value> = order(run)
        .iter()
        .map(|id| {
            let step = run.steps().get(id);
            let described = json!({
                "state": run.step_state(id),
                "tries": step.map(|step| step.tries()),
                "elapsed_ms": step.and_then(|step| step.elapsed_ms()),
                "undo_elapsed_ms": step.and_then(|step| step.undo_elapsed_ms()),
                "error": step.and_then(|step| step.error()),
            });
            (id.to_string(), described)
        })
        .collect();
    let checks: Vec<Value> = run
        .checks()
        .iter()
        .map(|((phase, check), verdict)| json!({ "phase": phase, "check": check, "verdict": verdict }))
        .collect();
    json!({
        "run": run.id(),
        "pipeline": header.pipeline,
        "environment": header.environment,
        "from": header.from,
        "to": header.to,
        "state": run.state(),
        "held_from": run.held_from(),
        "cause": run.cause(),
        "deadline": run.deadline(),
        "health": run.health(),
        "created": run.created_at(),
        "updated": run.updated_at(),
        "entries": run.entries(),
        "driver": driver.map(|driver| json!({ "actor": driver.actor, "alive": driver.alive })),
        "steps": steps,
        "checks": checks,
    })
}
