//! One column in two shapes that stay in step: how a column is changed beside live traffic.
//!
//! ```text
//!                 apply                                                       commit
//!  found ──► expanded ──► filled ──► indexed ──► valid ──► in step ─────────────► contracted
//!    ▲          │            │          │          │          │
//!    └──────────┴────────────┴──────────┴──────────┴──────────┘
//!                            rollback
//!
//!  expanded    the new column, the triggers that keep both shapes in step, and the constraints of
//!              the new shape, NOT VALID; one short transaction
//!  filled      every row from before the triggers, in batches
//!  indexed     the indexes of the new shape, CONCURRENTLY
//!  valid       its constraints, validated beside live traffic
//!  in step     NOT NULL set without a scan; the view of the new shape, if there is to be one
//!  contracted  triggers, function, view and the old column are gone; one short transaction
//! ```
//!
//! Each arrow writes its phase to the ledger in the transaction of its effect, so that whoever comes
//! after a crash goes on from there. Rollback is one short transaction from any phase: what was
//! written through the new shape has been in the old one since it was written.

mod catalog;
mod change;
mod contract;
mod definitions;
mod fill;
mod phases;
mod refusals;
mod statements;
mod survey;

pub use change::{AddColumn, ExpandConfig, NotNullColumn, RenameColumn, RetypeColumn};
pub(crate) use change::{Change as Wanted, Expansion};
pub(crate) use contract::{contract, withdraw};
pub(crate) use fill::fill;
pub(crate) use phases::{Phase, expand, finish, index, progress, validate};
pub(crate) use survey::{Answer, Surveyed, survey};

#[cfg(test)]
mod tests {
    use super::Phase;

    #[test]
    fn the_drawing_shows_every_phase_in_its_order() {
        let drawn = include_str!("mod.rs").lines().find(|line| line.contains("──► expanded")).unwrap();
        let drawn: Vec<String> =
            drawn.split('►').skip(1).map(|phase| phase.trim_end_matches(['─', ' ']).trim().replace(' ', "_")).collect();
        let phases: Vec<String> =
            Phase::ALL.iter().map(|phase| serde_json::to_value(phase).unwrap().as_str().unwrap().to_owned()).collect();
        assert_eq!(drawn, phases);
        assert!(Phase::ALL.is_sorted());
    }
}
