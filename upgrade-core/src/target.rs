//! What an upgrade changes, as far as two upgrades must not change it at once.

use async_trait::async_trait;

use crate::context::Context;
use crate::error::StepError;
use crate::names::LockName;

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
}

/// Tells this machine from another: by `machine-id(5)`, else by the host's name.
pub fn this_machine() -> String {
    let id = ["/etc/machine-id", "/var/lib/dbus/machine-id"].into_iter().find_map(|path| {
        let text = std::fs::read_to_string(path).ok()?;
        (!text.trim().is_empty()).then(|| format!("machine-id {}", text.trim()))
    });
    id.unwrap_or_else(|| format!("host {}", rustix::system::uname().nodename().to_string_lossy()))
}
