//! How long a journal waits for a lease that somebody else holds.

use std::time::Duration;

use super::{JournalError, Lease};
use crate::names::LockName;

/// How often a lease that somebody else holds is tried again.
const POLL: Duration = Duration::from_millis(25);

/// Takes a lease, as [`Journal::acquire`](super::Journal::acquire) does: `attempt` tries once, with
/// the names in the order in which all take them, and is called again while they are held.
///
/// # Errors
/// What the last attempt said.
pub async fn acquire_within<F, A>(locks: &[LockName], patience: Duration, mut attempt: F) -> Result<Lease, JournalError>
where
    F: FnMut(Vec<LockName>) -> A + Send,
    A: Future<Output = Result<Lease, JournalError>> + Send,
{
    let mut names = locks.to_vec();
    names.sort();
    names.dedup();
    let mut waited = Duration::ZERO;
    loop {
        match attempt(names.clone()).await {
            Err(JournalError::Held { .. }) if waited < patience => {
                let pause = POLL.min(patience - waited);
                tokio::time::sleep(pause).await;
                waited += pause;
            }
            answer => return answer,
        }
    }
}
