//! Requests, one every few milliseconds, each on a connection of its own; and the gaps between those
//! that were answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use crate::Outcome;

/// The pause between two requests.
pub const EVERY: Duration = Duration::from_millis(5);
/// How long one may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long it may take to connect on loopback. The kernel repeats an attempt that nobody answered only
/// after a second: who waited for that would count it as downtime.
const CONNECTS_WITHIN: Duration = Duration::from_millis(20);

/// Asks a service until it is stopped.
pub struct Traffic {
    over: Arc<AtomicBool>,
    answers: JoinHandle<Vec<(Instant, String)>>,
}

/// Tells how long nobody answered while one instance of a service took the place of another.
#[derive(Debug, Clone)]
pub struct Gap {
    /// When the old one answered last.
    pub last: Instant,
    /// When the new one answered first.
    pub first: Instant,
}

impl Gap {
    /// Returns how long it was, in milliseconds.
    pub fn milliseconds(&self) -> f64 {
        (self.first - self.last).as_secs_f64() * 1e3
    }
}

impl Traffic {
    /// Waits until the service at a port of loopback answers, and asks it from then on.
    ///
    /// # Errors
    /// It does not come to answer.
    pub async fn start(port: u16) -> Outcome<Self> {
        answering(port).await?;
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let answers = tokio::spawn(async move {
            let mut clock = interval(EVERY);
            clock.set_missed_tick_behavior(MissedTickBehavior::Skip);
            let mut all = JoinSet::new();
            while !ended.load(Ordering::Relaxed) {
                clock.tick().await;
                all.spawn(request(port));
            }
            let mut answers: Vec<_> = all.join_all().await.into_iter().flatten().collect();
            answers.sort_unstable_by_key(|(at, _)| *at);
            answers
        });
        // The old one is to have answered before anything is done to it.
        sleep(EVERY * 20).await;
        Ok(Self { over, answers })
    }

    /// Waits until the service answers, ends the requests, and returns the gaps where one instance took the
    /// place of another, in order.
    ///
    /// # Errors
    /// It does not come to answer.
    pub async fn stop(self, port: u16) -> Outcome<Vec<Gap>> {
        answering(port).await?;
        sleep(EVERY * 20).await;
        self.over.store(true, Ordering::Relaxed);
        let answers = self.answers.await?;
        let changed = answers.windows(2).filter(|pair| pair[0].1 != pair[1].1);
        Ok(changed.map(|pair| Gap { last: pair[0].0, first: pair[1].0 }).collect())
    }
}

async fn answering(port: u16) -> Outcome<()> {
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(60) {
        if request(port).await.is_some() {
            return Ok(());
        }
        sleep(EVERY).await;
    }
    Err("the service does not come to answer".into())
}

/// Asks which instance answers; returns when, and which.
async fn request(port: u16) -> Option<(Instant, String)> {
    let asked = async {
        let mut stream = timeout(CONNECTS_WITHIN, TcpStream::connect(("127.0.0.1", port))).await??;
        stream.write_all(b"GET /id HTTP/1.0\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = timeout(PATIENCE, asked).await.ok()?.ok()?;
    let (head, id) = answer.split_once("\r\n\r\n")?;
    let good = head.split(' ').nth(1) == Some("200") && id.trim().len() == 36;
    good.then(|| (Instant::now(), id.trim().to_owned()))
}
