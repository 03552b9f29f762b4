//! An engine's socket: asked by hand, as with curl, and watched while somebody else asks.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

use crate::Outcome;

/// Sends one request on a connection of its own; returns the answer, if it is JSON.
///
/// # Errors
/// The engine refuses it.
pub async fn ask(socket: &Path, method: &str, path: &str, body: Option<&Value>) -> Outcome<Value> {
    let mut stream = UnixStream::connect(socket).await?;
    let body = body.map(ToString::to_string).unwrap_or_default();
    let head = format!(
        "{method} {path} HTTP/1.0\r\nHost: engine\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, text) = answer.split_once("\r\n\r\n").ok_or("the engine gave no answer")?;
    if !head.split(' ').nth(1).is_some_and(|status| status.starts_with('2')) {
        return Err(format!("{method} {path}: {answer}").into());
    }
    Ok(serde_json::from_str(text).unwrap_or_default())
}

/// Describes one call that went through a [`Watch`].
#[derive(Debug, Clone)]
pub struct Call {
    /// The method and the path.
    pub what: String,
    /// When its first byte was sent.
    pub began: Instant,
    /// When the last byte of its answer came.
    pub ended: Instant,
}

/// Stands between a client and an engine and notes each call; ended on drop.
pub struct Watch {
    path: PathBuf,
    calls: Arc<Mutex<Vec<Call>>>,
    listening: JoinHandle<()>,
}

impl Watch {
    /// Listens at a path in place of the engine's socket.
    ///
    /// # Errors
    /// It cannot.
    pub fn over(socket: &Path, path: PathBuf) -> Outcome<Self> {
        let listener = UnixListener::bind(&path)?;
        let calls = Arc::new(Mutex::new(Vec::new()));
        let (socket, noted) = (socket.to_owned(), Arc::clone(&calls));
        let listening = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(pass(client, socket.clone(), Arc::clone(&noted)));
            }
        });
        Ok(Self { path, calls, listening })
    }

    /// Returns where it is, as `DOCKER_HOST` spells it.
    pub fn host(&self) -> String {
        format!("unix://{}", self.path.display())
    }

    /// Returns the calls since the last time, in order.
    pub fn take(&self) -> Vec<Call> {
        let mut calls = std::mem::take(&mut *self.calls.lock().unwrap_or_else(PoisonError::into_inner));
        calls.sort_unstable_by_key(|call| call.began);
        calls
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.listening.abort();
    }
}

/// Returns the time in which at least one of the calls was under way.
pub fn busy(calls: &[Call]) -> Duration {
    let mut sum = Duration::ZERO;
    let mut until: Option<Instant> = None;
    for call in calls {
        let from = until.map_or(call.began, |until| until.max(call.began));
        sum += call.ended.saturating_duration_since(from);
        until = Some(until.map_or(call.ended, |until| until.max(call.ended)));
    }
    sum
}

/// Passes both directions on; on a connection, a call begins when the one before is answered.
async fn pass(mut client: UnixStream, socket: PathBuf, calls: Arc<Mutex<Vec<Call>>>) {
    let Ok(mut engine) = UnixStream::connect(&socket).await else { return };
    let (mut from_client, mut from_engine) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    let mut place: Option<usize> = None;
    let mut answered = true;
    loop {
        tokio::select! {
            read = client.read(&mut from_client) => {
                let Ok(count @ 1..) = read else { break };
                let now = Instant::now();
                if answered {
                    let text = String::from_utf8_lossy(&from_client[..count.min(400)]).into_owned();
                    let what = text.lines().next().unwrap_or_default().trim_end_matches(" HTTP/1.1").to_owned();
                    let mut calls = calls.lock().unwrap_or_else(PoisonError::into_inner);
                    place = Some(calls.len());
                    calls.push(Call { what, began: now, ended: now });
                    answered = false;
                }
                if engine.write_all(&from_client[..count]).await.is_err() { break }
            }
            read = engine.read(&mut from_engine) => {
                let Ok(count @ 1..) = read else { break };
                answered = true;
                if client.write_all(&from_engine[..count]).await.is_err() { break }
                let mut calls = calls.lock().unwrap_or_else(PoisonError::into_inner);
                // The list may have been taken away in between.
                if let Some(call) = place.and_then(|place| calls.get_mut(place)) {
                    call.ended = Instant::now();
                }
            }
        }
    }
}
