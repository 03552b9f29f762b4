//! What the process answers its caller with.

use std::process::ExitCode;

use serde::{Serialize, Serializer};
use upgrade_core::entry::Health;
use upgrade_core::executor::Outcome;

/// Lists every exit status of the command; scripts depend on the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Exit {
    /// Done.
    Done = 0,
    /// Internal error or I/O; the run, if any, can be resumed.
    Internal = 1,
    /// Wrong usage, or an invalid pipeline.
    Usage = 2,
    /// A check failed, or its verdict stayed unknown, before anything was changed.
    Rejected = 3,
    /// The run failed and everything is back as it was.
    RolledBack = 4,
    /// An operator must decide.
    Operator = 5,
    /// Held, stopped, or applied and not yet committed: resumable.
    Open = 6,
    /// Refused: somebody else's lease, a rule, or a pipeline that is not the run's.
    Refused = 7,
    /// `plan --detailed-exitcode`: there is something to do.
    Changes = 10,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(exit as u8)
    }
}

impl Serialize for Exit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u8(*self as u8)
    }
}

/// Says what the caller asked for: an ending that was asked for is no failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asked {
    /// That the upgrade is carried out.
    Upgrade,
    /// That it is put back.
    Rollback,
    /// That a stuck step is decided about, and the rollback goes on.
    Resolution,
    /// That the run is held.
    Stop,
}

impl Exit {
    /// Chooses the status for how a run ended or why it waits.
    pub(crate) fn of(outcome: &Outcome, asked: Asked) -> Self {
        match (outcome, asked) {
            (Outcome::RolledBack { health: Health::RestoredButUnhealthy, .. }, _) => Exit::Operator,
            (Outcome::RolledBack { .. }, Asked::Rollback | Asked::Resolution) => Exit::Done,
            (Outcome::Held { .. }, Asked::Stop) => Exit::Done,
            (Outcome::Abandoned { .. }, Asked::Resolution) => Exit::Done,
            (Outcome::Committed, _) => Exit::Done,
            (Outcome::RolledBack { .. }, _) => Exit::RolledBack,
            // Nothing had been changed: what was asked for is so.
            (Outcome::Rejected { .. }, Asked::Rollback) => Exit::Done,
            (Outcome::Rejected { .. }, _) => Exit::Rejected,
            (Outcome::Stuck { .. } | Outcome::Abandoned { .. }, _) => Exit::Operator,
            (Outcome::Held { .. } | Outcome::Probation { .. }, _) => Exit::Open,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use upgrade_core::transition::RunState;

    #[test]
    fn an_ending_that_was_asked_for_is_no_failure() {
        let restored = Outcome::RolledBack { cause: None, health: Health::Restored };
        assert_eq!(Exit::of(&restored, Asked::Upgrade) as u8, 4);
        assert_eq!(Exit::of(&restored, Asked::Rollback) as u8, 0);
        let held = Outcome::Held { cause: None, state: RunState::Applying };
        assert_eq!(Exit::of(&held, Asked::Upgrade) as u8, 6);
        assert_eq!(Exit::of(&held, Asked::Stop) as u8, 0);
        assert_eq!(Exit::of(&held, Asked::Rollback) as u8, 6);
        let rejected = Outcome::Rejected { cause: None };
        assert_eq!(Exit::of(&rejected, Asked::Upgrade) as u8, 3);
        assert_eq!(Exit::of(&rejected, Asked::Rollback) as u8, 0);
    }

    #[test]
    fn an_unhealthy_system_is_never_a_success() {
        let unhealthy = Outcome::RolledBack { cause: None, health: Health::RestoredButUnhealthy };
        for asked in [Asked::Upgrade, Asked::Rollback, Asked::Resolution, Asked::Stop] {
            assert_eq!(Exit::of(&unhealthy, asked) as u8, 5);
        }
    }

    #[test]
    fn a_run_that_waits_is_resumable() {
        assert_eq!(Exit::of(&Outcome::Probation { deadline: None }, Asked::Upgrade) as u8, 6);
        assert_eq!(Exit::of(&Outcome::Stuck { steps: vec![], cause: None }, Asked::Rollback) as u8, 5);
        assert_eq!(Exit::of(&Outcome::Abandoned { steps: vec![] }, Asked::Resolution) as u8, 0);
    }
}
