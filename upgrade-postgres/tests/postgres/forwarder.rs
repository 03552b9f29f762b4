//! A stretch of network between a test and a server: it can break in the middle of a commit, and
//! fall silent.

#![cfg(test)]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use upgrade_testbed::postgres::Database;

/// How much of a `COMMIT` arrives before the connection breaks, and how long after that it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cut {
    /// A part of the message, so that the server rolls back.
    Within,
    /// All of it, and the connection breaks after so many microseconds.
    After(u64),
}

#[derive(Debug, Default)]
struct State {
    cut: std::sync::Mutex<Option<Cut>>,
    cuts: AtomicUsize,
    silent: AtomicBool,
}

/// Forwards every connection to a server.
#[derive(Debug)]
pub(crate) struct Forwarder {
    address: SocketAddr,
    state: Arc<State>,
    task: JoinHandle<()>,
}

impl Forwarder {
    pub(crate) async fn to(host: &str, port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State::default());
        let (shared, host) = (Arc::clone(&state), host.to_owned());
        let task = tokio::spawn(async move {
            let mut running = tokio::task::JoinSet::new();
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let server = TcpStream::connect((host.as_str(), port)).await.unwrap();
                running.spawn(forward(client, server, Arc::clone(&shared)));
            }
        });
        Self { address, state, task }
    }

    pub(crate) async fn before(database: &Database) -> Self {
        Self::to(database.host(), database.port()).await
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Leads a URL through it.
    pub(crate) fn url(&self, database: &Database) -> String {
        database.url().replace(&format!(":{}/", database.port()), &format!(":{}/", self.address.port()))
    }

    /// Breaks the connection of the next commit.
    pub(crate) fn cut_next_commit(&self, cut: Cut) {
        *self.state.cut.lock().unwrap() = Some(cut);
    }

    pub(crate) fn cuts(&self) -> usize {
        self.state.cuts.load(Ordering::SeqCst)
    }

    /// Lets nothing through any more on the connections that there are.
    pub(crate) fn fall_silent(&self) {
        self.state.silent.store(true, Ordering::SeqCst);
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn forward(client: TcpStream, server: TcpStream, state: Arc<State>) {
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    // The answer to a commit on which the connection breaks is never heard.
    let deaf = AtomicBool::new(false);
    let born_into_silence = state.silent.load(Ordering::SeqCst);
    let up = async {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let Ok(length @ 1..) = from_client.read(&mut buffer).await else { return };
            let message = &buffer[..length];
            if !born_into_silence && state.silent.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            let commits = message.windows(7).any(|part| part.eq_ignore_ascii_case(b"commit\0"));
            let cut = if commits { state.cut.lock().unwrap().take() } else { None };
            deaf.store(cut.is_some(), Ordering::SeqCst);
            match cut {
                Some(Cut::Within) => {
                    state.cuts.fetch_add(1, Ordering::SeqCst);
                    let _ = to_server.write_all(&message[..length - 3]).await;
                    return;
                }
                Some(Cut::After(microseconds)) => {
                    state.cuts.fetch_add(1, Ordering::SeqCst);
                    let _ = to_server.write_all(message).await;
                    let began = std::time::Instant::now();
                    while began.elapsed() < Duration::from_micros(microseconds) {
                        tokio::task::yield_now().await;
                    }
                    return;
                }
                None if to_server.write_all(message).await.is_err() => return,
                None => {}
            }
        }
    };
    let down = async {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let Ok(length @ 1..) = from_server.read(&mut buffer).await else { return };
            if !born_into_silence && state.silent.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            if deaf.load(Ordering::SeqCst) {
                continue;
            }
            if to_client.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    };
    tokio::select! { () = up => {}, () = down => {} }
}
