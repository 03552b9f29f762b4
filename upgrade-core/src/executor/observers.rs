//! Lets others watch a run without letting them hold it up.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use crate::context::Progress;
use crate::entry::Record;
use crate::names::RunId;

/// Watches runs. Cannot fail them, cannot slow them down.
///
/// # Guarantees
/// `entry` is called for every record, in order, after it is durable. Each observer has a thread
/// of its own; one that panics is left out from then on.
///
/// # Caveats
/// Progress may be dropped when the observer is slower than the run; entries are not. When a
/// driver ends it waits for its observers, five seconds at most.
pub trait Observer: Send + 'static {
    /// Sees a record that is durable.
    fn entry(&mut self, run: &RunId, record: &Record);

    /// Sees how far a call has come.
    fn progress(&mut self, _progress: &Progress) {}
}

/// How much progress may wait for an observer before more of it is dropped.
const PROGRESS_WAITING: usize = 256;

/// How long a driver that ends waits for its observers.
const FLUSH: Duration = Duration::from_secs(5);

enum Event {
    Entry(Arc<(RunId, Record)>),
    Progress(Arc<Progress>),
    Flush(mpsc::Sender<()>),
}

struct Post {
    events: mpsc::Sender<Event>,
    progress_waiting: Arc<AtomicUsize>,
}

/// Hands events to every observer, each on a thread of its own.
#[derive(Default)]
pub(crate) struct Observers {
    posts: Vec<Post>,
}

impl Observers {
    pub(crate) fn add(&mut self, mut observer: impl Observer) {
        let (events, inbox) = mpsc::channel();
        let progress_waiting = Arc::new(AtomicUsize::new(0));
        let waiting = progress_waiting.clone();
        let started = std::thread::Builder::new().name("upgrade-observer".into()).spawn(move || {
            for event in inbox {
                match event {
                    Event::Entry(entry) => observer.entry(&entry.0, &entry.1),
                    Event::Progress(progress) => {
                        waiting.fetch_sub(1, Ordering::Relaxed);
                        observer.progress(&progress);
                    }
                    // Whoever asked may have stopped waiting.
                    Event::Flush(done) => drop(done.send(())),
                }
            }
        });
        match started {
            Ok(_) => self.posts.push(Post { events, progress_waiting }),
            Err(error) => tracing::warn!(%error, "an observer's thread could not be started; it sees nothing"),
        }
    }

    pub(crate) fn entry(&self, run: &RunId, record: &Record) {
        if self.posts.is_empty() {
            return;
        }
        let entry = Arc::new((run.clone(), record.clone()));
        for post in &self.posts {
            // An observer that panicked has closed its inbox; the run goes on without it.
            let _ = post.events.send(Event::Entry(entry.clone()));
        }
    }

    pub(crate) fn progress(&self, progress: Progress) {
        let progress = Arc::new(progress);
        for post in &self.posts {
            if post.progress_waiting.fetch_add(1, Ordering::Relaxed) < PROGRESS_WAITING {
                let _ = post.events.send(Event::Progress(progress.clone()));
            } else {
                post.progress_waiting.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// Waits until every observer has seen what was sent so far, or the time is up.
    pub(crate) async fn flush(&self) {
        let waiting: Vec<_> = self
            .posts
            .iter()
            .filter_map(|post| {
                let (done, seen) = mpsc::channel();
                post.events.send(Event::Flush(done)).ok().map(|()| seen)
            })
            .collect();
        if waiting.is_empty() {
            return;
        }
        let wait = tokio::task::spawn_blocking(move || {
            let end = std::time::Instant::now() + FLUSH;
            for seen in waiting {
                // An error is a panic or a time-out: nothing more to wait for.
                let _ = seen.recv_timeout(end.saturating_duration_since(std::time::Instant::now()));
            }
        });
        let _ = wait.await;
    }
}
