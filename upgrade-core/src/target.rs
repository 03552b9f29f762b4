//! What an upgrade changes, as far as two upgrades must not change it at once.

use std::sync::Arc;

use async_trait::async_trait;

use crate::context::Context;
use crate::error::StepError;
use crate::names::{LockName, RunId};

/// Names a thing that steps change, and tells it from another of the same name.
///
/// # Guarantees
/// The executor locks the names of all targets of a run, in sorted order, before anything is
/// read, records every identity, and refuses to resume or to undo on another one.
///
/// # Assumptions
/// `lock` is pure and canonical: whoever means the same thing gets the same name. `identity`
/// stays the same for the life of the thing and differs between two of them (a PostgreSQL
/// system identifier, a Docker engine id, a machine id).
///
/// # Errors
/// An identity that cannot be read stops the run before anything is changed.
#[async_trait]
pub trait Target: Send + Sync + 'static {
    /// Returns the canonical name under which the target is locked.
    fn lock(&self) -> LockName;

    /// Reads what tells this target from another of the same name.
    async fn identity(&self, cx: &Context) -> Result<String, StepError>;

    /// Returns where runs of machines that share no journal keep apart, if the target has such a place.
    fn claims(&self) -> Option<Arc<dyn Claims>> {
        None
    }
}

/// Keeps runs apart that are driven from machines that share no journal, in the target itself.
///
/// # Guarantees
/// The executor claims after the run is durable and before anything is read or changed, again whenever the
/// run is taken up, and releases just before the entry that ends the run. A claim is not bounded in time: as
/// in a journal, a run that is neither committed nor rolled back keeps others out, whoever drives it.
///
/// # Assumptions
/// Of two runs that claim overlapping locks at once, one gets them. A claim that is there already is not
/// made twice; a release of what is not there is done.
#[async_trait]
pub trait Claims: Send + Sync + 'static {
    /// Names the place; targets that share it are claimed together.
    fn place(&self) -> String;

    /// Claims locks for the run of this call; answers with the run that has one of them.
    ///
    /// # Errors
    /// The place cannot be read or written: the run does not begin.
    async fn claim(&self, cx: &Context, locks: &[LockName]) -> Result<Option<Claimed>, StepError>;

    /// Takes the claim of a run away.
    ///
    /// # Errors
    /// The place cannot be read or written: the run ends all the same, and is named when another one claims.
    async fn release(&self, cx: &Context, run: &RunId) -> Result<(), StepError>;
}

/// Names the run that has claimed what another one needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimed {
    /// The run.
    pub run: String,
    /// Who claimed it, where, and since when, in one line.
    pub by: String,
    /// How an operator takes a claim away whose run is nowhere any more.
    pub remedy: String,
}

/// Tells this machine from another: by `machine-id(5)`, else by the host's name.
pub fn this_machine() -> String {
    let id = ["/etc/machine-id", "/var/lib/dbus/machine-id"].into_iter().find_map(|path| {
        let text = std::fs::read_to_string(path).ok()?;
        (!text.trim().is_empty()).then(|| format!("machine-id {}", text.trim()))
    });
    id.unwrap_or_else(|| format!("host {}", rustix::system::uname().nodename().to_string_lossy()))
}
