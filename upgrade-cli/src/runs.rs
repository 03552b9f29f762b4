//! Which run is meant: the latest, or the one whose id starts so.

use std::sync::Arc;

use upgrade_core::journal::{Journal, RunSummary};

use crate::failure::{Failure, Result};
use crate::recorded::Recorded;
use crate::session::Session;

/// Says which runs a command without RUN looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Default {
    /// The latest run.
    Latest,
    /// The latest run that is not over.
    LatestOpen,
}

/// Chooses a run of the journal.
pub(crate) async fn choose(journal: &dyn Journal, wanted: Option<&str>, default: Default) -> Result<RunSummary> {
    pick(journal.runs().await?, wanted, default)
}

/// Finds the run that a person means, the latest open one if they name none, with what its journal says.
pub(crate) async fn open_run(session: &Session, wanted: Option<&str>) -> Result<(Arc<dyn Journal>, Recorded)> {
    let journal = session.journal_with_runs().await?;
    let chosen = choose(&*journal, wanted, Default::LatestOpen).await?;
    let recorded = Recorded::load(&*journal, &chosen.run).await?;
    Ok((journal, recorded))
}

fn pick(mut runs: Vec<RunSummary>, wanted: Option<&str>, default: Default) -> Result<RunSummary> {
    let Some(wanted) = wanted else {
        return match default {
            Default::Latest => runs.pop().ok_or_else(|| {
                Failure::usage("there is no run yet")
                    .with_hint("`upgrade run FILE` makes one; --state-dir names another place")
            }),
            Default::LatestOpen => runs.into_iter().rev().find(is_open).ok_or_else(|| {
                Failure::refused("no run is open").with_hint("`upgrade history` lists the runs and how they ended")
            }),
        };
    };
    let lower = wanted.to_ascii_lowercase();
    // An empty text, as an unset variable leaves it, is the start of every name and means none.
    runs.retain(|run| !lower.is_empty() && run.run.as_str().starts_with(&lower));
    if let Some(whole) = runs.iter().position(|run| run.run.as_str() == lower) {
        return Ok(runs.remove(whole));
    }
    match runs.len() {
        0 => {
            Err(Failure::usage(format!("no run's id starts with `{wanted}`"))
                .with_hint("`upgrade history` lists the runs"))
        }
        1 => Ok(runs.remove(0)),
        count => {
            let ids: Vec<_> = runs.iter().map(|run| run.run.as_str()).collect();
            Err(Failure::usage(format!("`{wanted}` is the start of {count} runs: {}", ids.join(", ")))
                .with_hint("give more characters of the id"))
        }
    }
}

/// Tells whether a run still blocks others; a damaged one may.
pub(crate) fn is_open(run: &RunSummary) -> bool {
    run.state.is_none_or(|state| !state.is_final())
}

/// Shortens ids as far as they stay different, to eight characters at least.
pub(crate) fn short_length<'a>(ids: impl IntoIterator<Item = &'a str>) -> usize {
    let mut ids: Vec<&str> = ids.into_iter().collect();
    ids.sort_unstable();
    let shared = |pair: &[&str]| pair[0].bytes().zip(pair[1].bytes()).take_while(|(a, b)| a == b).count();
    ids.windows(2).map(|pair| shared(pair) + 1).max().unwrap_or(0).max(8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use upgrade_core::transition::RunState;

    fn run(id: &str, state: RunState) -> RunSummary {
        RunSummary {
            run: id.parse().unwrap(),
            pipeline: None,
            environment: None,
            from: None,
            to: None,
            locks: vec![],
            fingerprint: String::new(),
            base_fingerprint: String::new(),
            state: Some(state),
            created: None,
            updated: None,
            entries: 1,
            damage: None,
        }
    }

    fn three() -> Vec<RunSummary> {
        vec![
            run("0193aa11", RunState::Held),
            run("0193aa22", RunState::Committed),
            run("0193bb33", RunState::Committed),
        ]
    }

    #[test]
    fn without_a_name_the_latest_is_meant() {
        assert_eq!(pick(three(), None, Default::Latest).unwrap().run.as_str(), "0193bb33");
        assert_eq!(pick(three(), None, Default::LatestOpen).unwrap().run.as_str(), "0193aa11");
        assert!(pick(three().split_off(1), None, Default::LatestOpen).is_err());
    }

    #[test]
    fn ids_may_be_shortened_while_they_are_unambiguous() {
        assert_eq!(pick(three(), Some("0193B"), Default::Latest).unwrap().run.as_str(), "0193bb33");
        let ambiguous = pick(three(), Some("0193aa"), Default::Latest).unwrap_err();
        assert!(format!("{ambiguous:?}").contains("0193aa11, 0193aa22"));
        assert!(pick(three(), Some("ff"), Default::Latest).is_err());
    }

    #[test]
    fn shortened_ids_stay_different() {
        assert_eq!(short_length(["0193aa11-7", "0193aa11-8"]), 10);
        assert_eq!(short_length(["0193aa11"]), 8);
        assert_eq!(short_length([]), 8);
    }
}
