//! How a backup is put back where a migration has no down script.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use crate::target::Database;

/// Puts a backup back into the place of a database.
///
/// # Assumptions
/// Called again, after an error or a crash, it converges. What the backup holds replaces all that
/// is in the database, the notes of the run included: they say then that nothing was applied.
#[async_trait]
pub trait RestoreEngine: Send + Sync + 'static {
    /// Puts back the backup that a step `postgres.backup` made; `output` is that step's.
    async fn restore(&self, cx: &Context, database: &Database, output: &Value) -> Result<(), StepError>;
}

/// Returns this crate's own engine, if it has one.
pub(super) fn engine() -> Option<Arc<dyn RestoreEngine>> {
    None
}
