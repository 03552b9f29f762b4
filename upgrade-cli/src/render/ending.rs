//! How a run ended or why it waits, and what can be done now.

use std::fmt::Write as _;

use upgrade_core::entry::{Cause, Health};
use upgrade_core::executor::{Outcome, Report};
use upgrade_core::transition::RunState;

use super::Title;
use super::event::{clock, failed};
use super::palette::{Palette, harmless};
use crate::failure::chain;

/// Renders the end of a run for a person.
pub(crate) fn text(report: &Report, title: &Title, p: Palette) -> String {
    let run = &report.run;
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = match &report.outcome {
        Outcome::Committed => write!(text, "{} {title} is committed", p.good("✓")),
        Outcome::RolledBack { cause, health } => {
            let _ = match health {
                Health::Restored => {
                    write!(text, "{} {title} was rolled back: everything is as it was", p.careful("↩"))
                }
                Health::RestoredButUnhealthy => write!(
                    text,
                    "{} {title} was rolled back: everything is as it was found, but a check does not pass",
                    p.bad("✗")
                ),
            };
            because(&mut text, cause.as_ref(), p);
            match health {
                Health::Restored => Ok(()),
                Health::RestoredButUnhealthy => {
                    write!(text, "\n  {} `upgrade status {run}` shows which; the run itself is over", p.accent("hint:"))
                }
            }
        }
        Outcome::Rejected { cause } => {
            let _ = write!(text, "{} {title} was not begun: nothing was changed", p.bad("✗"));
            because(&mut text, cause.as_ref(), p);
            Ok(())
        }
        Outcome::Stuck { steps, cause } => {
            let _ = write!(text, "{} {title} is stuck: an operator must decide", p.bad("✗"));
            because(&mut text, cause.as_ref(), p);
            for (step, error) in steps {
                let said = error.as_ref().map_or_else(|| "it could not be undone".into(), |error| failed(error, p));
                let _ = write!(text, "\n  {} could not be undone: {said}", p.strong(step));
            }
            let step = steps.first().map_or("STEP", |(step, _)| step.as_str());
            write!(
                text,
                "\n  {} mend it, then `upgrade resolve {run} {step} --retry --reason …`; --skip if it was put back by hand, \
                 --abandon to leave it",
                p.accent("hint:")
            )
        }
        Outcome::Held { cause, state } => {
            let _ = write!(text, "{} {title} is held while {state}", p.careful("‖"));
            because(&mut text, cause.as_ref(), p);
            let next = match state {
                RunState::Committing => format!("`upgrade resume {run}` goes on; past the commit there is no way back"),
                RunState::RollingBack => format!("`upgrade resume {run}` goes on putting everything back"),
                _ => format!("`upgrade resume {run}` goes on, `upgrade rollback {run}` puts everything back"),
            };
            write!(text, "\n  {} {next}", p.accent("hint:"))
        }
        Outcome::Probation { deadline } => {
            let _ = write!(text, "{} {title} is applied and verified, not yet committed", p.accent("●"));
            if let Some(deadline) = deadline {
                let _ = write!(text, "; its probation ends at {}", clock(*deadline));
            }
            write!(
                text,
                "\n  {} `upgrade commit {run}` confirms it, `upgrade rollback {run}` puts everything back, \
                 `upgrade watch` sees it through",
                p.accent("hint:")
            )
        }
        Outcome::Abandoned { steps } => {
            let names: Vec<_> = steps.iter().map(ToString::to_string).collect();
            write!(text, "{} {title} was abandoned; these steps were not put back: {}", p.bad("✗"), names.join(", "))
        }
    };
    text
}

fn because(text: &mut String, cause: Option<&Cause>, p: Palette) {
    let Some(cause) = cause else { return };
    let _ = write!(text, "\n  {} {}", p.faint("because:"), harmless(&cause.to_string()));
    match cause {
        Cause::Step { error, .. } => chain(text, p, error.causes(), error.detail(), error.hint()),
        Cause::Check { verdict, .. } => chain(text, p, &[], None, verdict.hint.as_deref()),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use upgrade_core::error::StepError;

    fn rendered(outcome: Outcome) -> String {
        let title = Title { name: "notes".into(), from: None, to: None, environment: None };
        text(&Report { run: "0193aa".parse().unwrap(), outcome }, &title, Palette::new(false))
    }

    #[test]
    fn a_stuck_run_names_its_steps_and_the_way_out() {
        let error = StepError::permanent("the file is gone").with_hint("restore it");
        let steps = vec![("config".parse().unwrap(), Some(error))];
        let text = rendered(Outcome::Stuck { steps, cause: None });
        assert!(text.contains("config could not be undone: the file is gone"), "{text}");
        assert!(text.contains("hint: restore it"), "{text}");
        assert!(text.contains("upgrade resolve 0193aa config --retry"), "{text}");
    }

    #[test]
    fn a_rollback_says_why() {
        let cause = Cause::Step { step: "release".parse().unwrap(), error: StepError::permanent("no space") };
        let text = rendered(Outcome::RolledBack { cause: Some(cause), health: Health::Restored });
        assert!(text.contains("everything is as it was\n  because: step `release` failed: no space"), "{text}");
    }
}
