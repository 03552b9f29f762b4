//! What a run would do, step by step.

use std::fmt::Write as _;

use upgrade_core::executor::plan::{Plan, PlannedCheck, PlannedEffect, PlannedStep};
use upgrade_core::pipeline::CommitMode;
use upgrade_core::step::{Change, Effect};
use upgrade_core::verdict::Status;

use super::event::{failed, mark};
use super::palette::{Palette, harmless, indented};
use super::{Title, elapsed};

/// Renders a plan for a person.
pub(crate) fn text(plan: &Plan, p: Palette) -> String {
    let title = Title {
        name: plan.pipeline.to_string(),
        from: plan.from.clone(),
        to: plan.to.clone(),
        environment: plan.environment.clone(),
    };
    let mut text = format!("{}\n", p.strong(title));
    if !plan.checks.is_empty() {
        text += "\nChecks\n";
        plan.checks.iter().for_each(|check| text += &checked(check, p));
    }
    text += "\nSteps\n";
    for step in &plan.steps {
        text += &planned(step, p);
        if plan.pivot.as_ref() == Some(&step.id) {
            let _ = writeln!(text, "      {}", p.bad("the pivot: from here on the run only goes forward"));
        }
    }
    text += &format!("\n{}", summary(plan, p));
    text
}

fn checked(check: &PlannedCheck, p: Palette) -> String {
    let verdict = &check.verdict;
    let mut line = format!("  {} {}: {}\n", mark(verdict.status, p), check.id, harmless(&verdict.message));
    if let Some(hint) = verdict.hint.as_ref().filter(|_| verdict.status != Status::Pass) {
        let _ = writeln!(line, "      {} {}", p.accent("hint:"), harmless(hint));
    }
    line
}

fn planned(step: &PlannedStep, p: Palette) -> String {
    let head = format!("{} {}", p.strong(&step.id), p.faint(&step.kind));
    let mut text = match &step.effect {
        PlannedEffect::Change { changes } => {
            let mut text = format!("  {} {head}{}\n", p.careful("~"), p.faint(estimate(step)));
            changes.iter().for_each(|one| text += &format!("{}\n", change(one, p)));
            text
        }
        PlannedEffect::Unchanged { reason } => format!("  {} {head}: unchanged: {}\n", p.faint("="), harmless(reason)),
        PlannedEffect::KnownAfter { step } => {
            format!("  {} {head}: known when `{step}` is applied\n", p.careful("?"))
        }
        PlannedEffect::Skipped { reason } => format!("  {} {head}: skipped: {}\n", p.faint("-"), harmless(reason)),
        PlannedEffect::Failed { error, after: Some(step) } => {
            format!("  {} {head}: known when `{step}` is applied, perhaps; now: {}\n", p.careful("?"), failed(error, p))
        }
        PlannedEffect::Failed { error, after: None } => format!("  {} {head}: {}\n", p.bad("✗"), failed(error, p)),
    };
    if let Some(reason) = &step.irreversible {
        let _ = writeln!(text, "      {} {}", p.bad("irreversible:"), harmless(reason));
    }
    text
}

fn estimate(step: &PlannedStep) -> String {
    match (step.estimate_ms, step.undo_estimate_ms) {
        (Some(forward), Some(back)) => format!(" · about {}, undone in {}", elapsed(forward), elapsed(back)),
        (Some(forward), None) => format!(" · about {}", elapsed(forward)),
        _ => String::new(),
    }
}

/// Renders one change, its diff below it.
pub(crate) fn change(change: &Change, p: Palette) -> String {
    let subject = harmless(&change.subject);
    let mut text = match change.effect {
        Effect::Create => format!("      {}", p.good(format_args!("+ {subject}"))),
        Effect::Modify => format!("      {}", p.careful(format_args!("~ {subject}"))),
        Effect::Remove => format!("      {}", p.removed(format_args!("- {subject}"))),
        Effect::Run => format!("      {}", p.accent(format_args!("▸ {subject}"))),
    };
    if let Some(summary) = &change.summary {
        let _ = write!(text, ": {}", harmless(summary));
    }
    if let Some(diff) = &change.diff {
        for line in indented(diff, 10).lines() {
            let _ = match line.trim_start().chars().next() {
                Some('+') => write!(text, "\n{}", p.good(line)),
                Some('-') => write!(text, "\n{}", p.removed(line)),
                Some('@') => write!(text, "\n{}", p.accent(line)),
                _ => write!(text, "\n{line}"),
            };
        }
    }
    text
}

fn summary(plan: &Plan, p: Palette) -> String {
    let idle =
        |step: &&PlannedStep| matches!(step.effect, PlannedEffect::Unchanged { .. } | PlannedEffect::Skipped { .. });
    let changed = plan.steps.len() - plan.steps.iter().filter(idle).count();
    let mut text = format!("{changed} of {} steps have something to do", plan.steps.len());
    if let Some(estimate) = plan.estimate_ms {
        let _ = write!(text, ", about {}", elapsed(estimate));
    }
    text += match plan.commit {
        CommitMode::Now => "; committed when it is verified",
        CommitMode::After(_) => "; committed after a probation",
        CommitMode::ConfirmWithin(_) => "; committed when it is confirmed",
    };
    match plan.commit {
        CommitMode::After(span) => text += &format!(" of {span}"),
        CommitMode::ConfirmWithin(span) => text += &format!(" within {span}, else rolled back"),
        CommitMode::Now => {}
    }
    text.push('\n');
    match &plan.pivot {
        Some(pivot) => text += &format!("{} reversible up to `{pivot}`\n", p.careful("!")),
        None => text += "every step can be undone until the commit\n",
    }
    for step in &plan.steps {
        if let PlannedEffect::Failed { after: Some(_), .. } = &step.effect {
            let id = &step.id;
            let _ = writeln!(
                text,
                "{} as things are now, `{id}` would fail and all before it be undone: mend it first, unless a step \
                 before it does",
                p.careful("!")
            );
        }
    }
    for (step, lost) in &plan.undo_loses {
        let _ = writeln!(text, "{} undoing `{step}` would lose: {}", p.careful("!"), harmless(lost));
    }
    text.trim_end().to_owned()
}
