//! The states of a run and of a step, and every way from one to another.
//!
//! # The states of a step
//!
//! ```text
//! pending     ──► prepared ──► applied ──► committed
//! pending     ──► unchanged
//! pending     ──► skipped
//! prepared    ──► undoing ──► undone
//! applied     ──► undoing ──► undo_failed
//! undo_failed ──► undoing
//! undo_failed ──► undone
//! undo_failed ──► abandoned
//! prepared    ──► abandoned
//! applied     ──► abandoned
//! ```
//!
//! A step is *prepared* from the moment its undo record is durable: whatever became of its
//! `apply`, it is undone. From *undo_failed* an operator leads on: retry (`undoing`), skip
//! (`undone`, mended by hand) or abandon; what an abandoned step needs is abandoned with it.
//!
//! # The states of a run
//!
//! ```text
//! checking     ──► applying ──► verifying ──► probation ──► committing ──► committed
//! checking     ──► rejected
//! verifying    ──► committing
//! applying     ──► rolling_back ──► rolled_back
//! verifying    ──► rolling_back ──► stuck ──► rolling_back
//! probation    ──► rolling_back ──► abandoned
//! probation    ──► verifying
//! checking     ──► held ──► checking
//! applying     ──► held ──► applying
//! verifying    ──► held ──► verifying
//! probation    ──► held ──► probation
//! committing   ──► held ──► committing
//! rolling_back ──► held ──► rolling_back
//! held         ──► rejected
//! ```
//!
//! *Probation* goes back to *verifying* when a driver takes the run up again: nobody watched the
//! guards meanwhile. *committing* is the point of no return.
//!
//! Anything else in a journal is corruption.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! states {
    ($(#[$doc:meta])* $type:ident { $($(#[$variant_doc:meta])* $variant:ident = $name:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $type { $($(#[$variant_doc])* $variant),+ }

        impl $type {
            /// Lists every state.
            pub const ALL: &[$type] = &[$($type::$variant),+];

            /// Returns the state's name as a journal writes it.
            pub fn name(self) -> &'static str {
                match self { $($type::$variant => $name),+ }
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.name().replace('_', " "))
            }
        }
    };
}

states! {
    /// The states of a step.
    StepState {
        /// Nothing was done.
        Pending = "pending",
        /// The undo record is durable; `apply` may have done all, part or nothing.
        Prepared = "prepared",
        /// `apply` is known to have finished.
        Applied = "applied",
        /// It was done already when the run came to it.
        Unchanged = "unchanged",
        /// Its condition did not hold.
        Skipped = "skipped",
        /// It is being put back.
        Undoing = "undoing",
        /// It is as it was found.
        Undone = "undone",
        /// Putting it back failed; an operator decides.
        UndoFailed = "undo_failed",
        /// An operator gave up putting it back.
        Abandoned = "abandoned",
        /// What its undo needed is removed.
        Committed = "committed",
    }
}

states! {
    /// The states of a run.
    RunState {
        /// Asking the pre-checks; nothing was changed.
        Checking = "checking",
        /// Applying steps.
        Applying = "applying",
        /// Asking the verifications.
        Verifying = "verifying",
        /// Applied and verified, not yet committed.
        Probation = "probation",
        /// Past the point of no return: removing what undo needed.
        Committing = "committing",
        /// Done.
        Committed = "committed",
        /// Undoing.
        RollingBack = "rolling_back",
        /// Everything is as it was found.
        RolledBack = "rolled_back",
        /// An undo failed; an operator decides.
        Stuck = "stuck",
        /// Waits for an operator, a gate or a window.
        Held = "held",
        /// A check said no before anything was changed.
        Rejected = "rejected",
        /// Ended by an operator with steps that were not put back.
        Abandoned = "abandoned",
    }
}

/// Lists every way from one state of a step to another.
pub const STEP_TRANSITIONS: &[(StepState, StepState)] = {
    use StepState::*;
    &[
        (Pending, Prepared),
        (Pending, Unchanged),
        (Pending, Skipped),
        (Prepared, Applied),
        (Applied, Committed),
        (Prepared, Undoing),
        (Applied, Undoing),
        (Undoing, Undone),
        (Undoing, UndoFailed),
        (UndoFailed, Undoing),
        (UndoFailed, Undone),
        (UndoFailed, Abandoned),
        (Prepared, Abandoned),
        (Applied, Abandoned),
    ]
};

/// Lists every way from one state of a run to another.
pub const RUN_TRANSITIONS: &[(RunState, RunState)] = {
    use RunState::*;
    &[
        (Checking, Applying),
        (Checking, Rejected),
        (Checking, Held),
        (Applying, Verifying),
        (Applying, RollingBack),
        (Applying, Held),
        (Verifying, Probation),
        (Verifying, Committing),
        (Verifying, RollingBack),
        (Verifying, Held),
        (Probation, Verifying),
        (Probation, Committing),
        (Probation, RollingBack),
        (Probation, Held),
        (Committing, Committed),
        (Committing, Held),
        (RollingBack, RolledBack),
        (RollingBack, Stuck),
        (RollingBack, Abandoned),
        (RollingBack, Held),
        (Stuck, RollingBack),
        (Held, Checking),
        (Held, Applying),
        (Held, Verifying),
        (Held, Probation),
        (Held, Committing),
        (Held, RollingBack),
        (Held, Rejected),
    ]
};

impl StepState {
    /// Tells whether a step may go from this state to `next`.
    pub fn may_become(self, next: Self) -> bool {
        STEP_TRANSITIONS.contains(&(self, next))
    }

    /// Tells whether what needs this step may start.
    pub fn lets_dependents_start(self) -> bool {
        matches!(self, Self::Applied | Self::Unchanged | Self::Skipped)
    }

    /// Tells whether a rollback has nothing (more) to do about this step.
    pub fn is_back(self) -> bool {
        matches!(self, Self::Pending | Self::Unchanged | Self::Skipped | Self::Undone)
    }
}

impl RunState {
    /// Tells whether a run may go from this state to `next`.
    pub fn may_become(self, next: Self) -> bool {
        RUN_TRANSITIONS.contains(&(self, next))
    }

    /// Tells whether the run is over and blocks nobody.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Committed | Self::RolledBack | Self::Rejected | Self::Abandoned)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Reads the chains of one drawing in this module's documentation.
    fn drawn(heading: &str) -> BTreeSet<(String, String)> {
        let source = include_str!("transition.rs");
        let drawing = source.split(heading).nth(1).unwrap().split("```").nth(1).unwrap();
        let mut edges = BTreeSet::new();
        for line in drawing.lines().skip(1) {
            let states: Vec<_> = line.trim_start_matches("//!").split("──►").map(|s| s.trim().to_owned()).collect();
            edges.extend(states.windows(2).map(|pair| (pair[0].clone(), pair[1].clone())));
        }
        edges
    }

    #[test]
    fn the_drawing_of_steps_is_the_table() {
        let table = STEP_TRANSITIONS.iter().map(|(a, b)| (a.name().into(), b.name().into())).collect();
        assert_eq!(drawn("# The states of a step"), table);
    }

    #[test]
    fn the_drawing_of_runs_is_the_table() {
        let table = RUN_TRANSITIONS.iter().map(|(a, b)| (a.name().into(), b.name().into())).collect();
        assert_eq!(drawn("# The states of a run"), table);
    }

    #[test]
    fn names_are_what_serde_writes() {
        for state in StepState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
        for state in RunState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
    }

    #[test]
    fn final_states_lead_nowhere() {
        for state in RunState::ALL {
            let leads_on = RUN_TRANSITIONS.iter().any(|(from, _)| from == state);
            assert_eq!(leads_on, !state.is_final(), "{state}");
        }
    }
}
