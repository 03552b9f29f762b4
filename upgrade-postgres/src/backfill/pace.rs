//! What the workers of one backfill share: when the next batch may begin, and when none may.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::throttle::{BatchSize, Governor};
use crate::error::{cancelled, not_cancelled};

/// The rows that a first batch has.
const FIRST: u32 = 500;
/// The rows that a batch has at most: its keys are one value.
const MOST: u32 = 50_000;

/// Paces batches.
#[derive(Debug)]
pub(crate) struct Pace {
    batch_time: Duration,
    rows_per_second: Option<f64>,
    most: u32,
    governor: Mutex<Governor>,
    /// When the next batch may begin, for the sake of `rows_per_second`.
    next: Mutex<Option<Instant>>,
    stopped: AtomicBool,
    /// For the sake of a measurement without batches.
    paused: AtomicBool,
    /// As an operator asked for it.
    pause_asked: AtomicBool,
    /// Rows walked, by this call and those before.
    pub(crate) walked: AtomicU64,
    /// Rows written, by this call and those before.
    pub(crate) written: AtomicU64,
    /// Rows written since the table was vacuumed.
    pub(crate) dead: AtomicU64,
    /// How many of them there may be while a vacuum runs, before the walk waits for it; none if
    /// none runs.
    dead_at_most: AtomicU64,
    /// Attempts that had to let others pass, since this was last asked.
    pub(crate) gave_way: AtomicU32,
    /// Batches and vacuums that run now.
    pub(crate) running: AtomicU32,
}

impl Pace {
    pub(crate) fn new(
        batch_time: Duration,
        rows_per_second: Option<f64>,
        most: Option<u32>,
        governor: Governor,
    ) -> Self {
        let by_rate = rows_per_second.map_or(MOST, |rate| (rate / 5.0).clamp(1.0, f64::from(MOST)) as u32);
        Self {
            batch_time,
            rows_per_second,
            most: most.unwrap_or(MOST).min(by_rate).clamp(1, MOST),
            governor: Mutex::new(governor),
            next: Mutex::new(None),
            stopped: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            pause_asked: AtomicBool::new(false),
            walked: AtomicU64::new(0),
            written: AtomicU64::new(0),
            dead: AtomicU64::new(0),
            dead_at_most: AtomicU64::new(u64::MAX),
            gave_way: AtomicU32::new(0),
            running: AtomicU32::new(0),
        }
    }

    pub(crate) fn first_size(&self) -> BatchSize {
        BatchSize::new(FIRST, self.most)
    }

    pub(crate) fn aim(&self) -> Duration {
        self.governor().aim(self.batch_time)
    }

    pub(crate) fn observe(&self, pressure: f64) {
        self.governor().observe(pressure);
    }

    pub(crate) fn sample(&self, beyond: bool) {
        self.governor().sample(beyond);
    }

    pub(crate) fn share(&self) -> f64 {
        self.governor().share()
    }

    fn governor(&self) -> std::sync::MutexGuard<'_, Governor> {
        self.governor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.paused.store(paused, Ordering::SeqCst);
    }

    pub(crate) fn ask_pause(&self, paused: bool) {
        self.pause_asked.store(paused, Ordering::SeqCst);
    }

    /// Begins to count dead rows anew, while a vacuum takes those before.
    pub(crate) fn vacuum_begins(&self, dead_at_most: u64) {
        self.running.fetch_add(1, Ordering::SeqCst);
        self.dead.store(0, Ordering::SeqCst);
        self.dead_at_most.store(dead_at_most, Ordering::SeqCst);
    }

    pub(crate) fn vacuum_ended(&self) {
        self.dead_at_most.store(u64::MAX, Ordering::SeqCst);
        self.running.fetch_sub(1, Ordering::SeqCst);
    }

    /// Or the table would grow faster than its space is made free.
    fn waits_for_vacuum(&self) -> bool {
        self.dead.load(Ordering::SeqCst) >= self.dead_at_most.load(Ordering::SeqCst)
    }

    fn is_paused(&self) -> bool {
        self.waits_for_vacuum() || self.paused.load(Ordering::SeqCst) || self.pause_asked.load(Ordering::SeqCst)
    }

    /// Waits until the next batch may begin; says false if none may any more.
    ///
    /// The time of the `asked` rows is taken at once, or every worker would begin at the same instant and
    /// the rate would hold between bursts only; [`after`](Self::after) returns what was not written.
    pub(crate) async fn next(&self, cx: &Context, asked: u32) -> Result<bool, StepError> {
        loop {
            not_cancelled(cx)?;
            if self.is_stopped() {
                return Ok(false);
            }
            let wait = if self.is_paused() {
                Duration::from_millis(20)
            } else {
                match self.wait_or_take(asked) {
                    None => return Ok(true),
                    Some(wait) => wait.min(Duration::from_millis(200)),
                }
            };
            sleep(cx, wait).await?;
        }
    }

    /// Takes the time of the next batch, or says how long it is until then.
    fn wait_or_take(&self, asked: u32) -> Option<Duration> {
        let rate = self.rows_per_second?;
        let now = Instant::now();
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let at = next.unwrap_or(now).max(now);
        if at > now {
            return Some(at - now);
        }
        *next = Some(at + Duration::from_secs_f64(f64::from(asked) / rate));
        None
    }

    /// Notes a batch of which `asked` rows were expected, and pauses as long as the share of time asks for.
    pub(crate) async fn after(
        &self,
        cx: &Context,
        asked: u32,
        walked: u64,
        written: u64,
        took: Duration,
    ) -> Result<(), StepError> {
        self.walked.fetch_add(walked, Ordering::SeqCst);
        self.written.fetch_add(written, Ordering::SeqCst);
        self.dead.fetch_add(written, Ordering::SeqCst);
        if let Some(rate) = self.rows_per_second {
            let unused = f64::from(asked) - written as f64;
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            *next = next.and_then(|next| {
                let change = Duration::from_secs_f64(unused.abs() / rate);
                if unused > 0.0 { next.checked_sub(change) } else { next.checked_add(change) }
            });
        }
        let mut left = self.governor().pause_after(took);
        while !left.is_zero() && !self.is_stopped() {
            let part = left.min(Duration::from_millis(200));
            sleep(cx, part).await?;
            left -= part;
        }
        Ok(())
    }
}

async fn sleep(cx: &Context, time: Duration) -> Result<(), StepError> {
    tokio::select! {
        () = tokio::time::sleep(time) => Ok(()),
        () = cx.cancelled().cancelled() => Err(cancelled()),
    }
}
