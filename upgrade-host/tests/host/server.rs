//! A small HTTP server for tests.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

/// Serves what a function of the request's number and text says, until it is dropped.
pub(crate) struct Server {
    pub(crate) port: u16,
    task: tokio::task::JoinHandle<()>,
}

/// What the server does with a request.
pub(crate) enum Reply {
    /// Sends this after waiting.
    Send(Duration, String),
    /// Closes the connection.
    Close,
}

impl Server {
    pub(crate) async fn start(answer: impl Fn(usize, &str) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let (answer, count) = (Arc::new(answer), Arc::new(AtomicUsize::new(0)));
        let task = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (answer, count) = (answer.clone(), count.clone());
                tokio::spawn(async move {
                    let mut request = vec![0; 8192];
                    let read = stream.read(&mut request).await.unwrap_or(0);
                    let number = count.fetch_add(1, Ordering::SeqCst);
                    match answer(number, &String::from_utf8_lossy(&request[..read])) {
                        Reply::Close => {}
                        Reply::Send(wait, text) => {
                            tokio::time::sleep(wait).await;
                            let _ = stream.write_all(text.as_bytes()).await;
                        }
                    }
                });
            }
        });
        Self { port, task }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Writes a reply.
pub(crate) fn reply(status: &str, headers: &str, body: &str) -> Reply {
    Reply::Send(Duration::ZERO, text(status, headers, body))
}

/// Writes a reply as it goes over the wire.
pub(crate) fn text(status: &str, headers: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n{headers}\r\n{body}", body.len())
}
