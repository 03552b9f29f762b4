//! The time by which a driver decides.

use std::time::Duration;

use jiff::Timestamp;
use tokio::time::Instant;

/// Tells the time: that of the wall, as long as it does not lag behind the time that has passed.
///
/// A wall clock that is set back must not stretch a budget or a probation; one that ran on while
/// the machine slept must count.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    started: Timestamp,
    since: Instant,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self { started: Timestamp::now(), since: Instant::now() }
    }

    pub(crate) fn now(&self) -> Timestamp {
        let passed = jiff::SignedDuration::try_from(self.since.elapsed()).unwrap_or_default();
        self.started.checked_add(passed).map_or_else(|_| Timestamp::now(), |passed| passed.max(Timestamp::now()))
    }

    /// Returns how long it is until `at`; zero if it has passed.
    pub(crate) fn until(&self, at: Timestamp) -> Duration {
        Duration::try_from(at.duration_since(self.now())).unwrap_or_default()
    }
}
