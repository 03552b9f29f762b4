//! Bodies of requests and answers, written and read by work that blocks on a thread of its own.

use std::io::{self, Read, Write};

use futures_util::{Stream, StreamExt as _};
use tokio::sync::mpsc;
use upgrade_core::context::{Context, blocking};
use upgrade_core::error::StepError;

use crate::error::{Doing, cancelled};

const PIECE: usize = 256 << 10;
/// Says that the engine ended first: why, its own answer says.
pub(crate) const GONE: &str = "the engine does not take more of the archive";

/// Reads pieces as they come.
pub(crate) struct Incoming<P> {
    receiver: mpsc::Receiver<P>,
    piece: Option<P>,
    at: usize,
}

impl<P> Incoming<P> {
    pub(crate) fn new(receiver: mpsc::Receiver<P>) -> Self {
        Self { receiver, piece: None, at: 0 }
    }
}

impl<P: AsRef<[u8]>> Read for Incoming<P> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let rest = self.piece.as_ref().map_or(&[][..], |piece| &piece.as_ref()[self.at..]);
            if !rest.is_empty() {
                let read = buffer.len().min(rest.len());
                buffer[..read].copy_from_slice(&rest[..read]);
                self.at += read;
                return Ok(read);
            }
            (self.piece, self.at) = (self.receiver.blocking_recv(), 0);
            if self.piece.is_none() {
                return Ok(0);
            }
        }
    }
}

/// Hands pieces on as they fill up.
pub(crate) struct Outgoing {
    sender: mpsc::Sender<io::Result<Vec<u8>>>,
    buffer: Vec<u8>,
}

impl Outgoing {
    pub(crate) fn new(sender: mpsc::Sender<io::Result<Vec<u8>>>) -> Self {
        Self { sender, buffer: Vec::with_capacity(PIECE) }
    }
}

impl Write for Outgoing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= PIECE {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.buffer, Vec::with_capacity(PIECE));
        if piece.is_empty() {
            return Ok(());
        }
        self.sender.blocking_send(Ok(piece)).map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, GONE))
    }
}

/// Gives what `work` writes as the body of a request, beside the work itself.
///
/// A body whose work failed breaks off: an end would make the part that was sent look whole.
pub(crate) fn feed<T: Send + 'static>(
    work: impl FnOnce(&mut dyn Write) -> Result<T, StepError> + Send + 'static,
) -> (impl Future<Output = Result<T, StepError>>, impl Stream<Item = io::Result<Vec<u8>>> + Send + 'static) {
    let (sender, receiver) = mpsc::channel(16);
    let working = blocking(move || {
        let mut outgoing = Outgoing::new(sender);
        let done = work(&mut outgoing);
        // If the engine has ended, it says why.
        let _ = match &done {
            Ok(_) => outgoing.flush().is_ok(),
            Err(_) => outgoing.sender.blocking_send(Err(io::Error::other("it broke off"))).is_ok(),
        };
        done
    });
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|piece| (piece, receiver))
    });
    (working, stream)
}

/// Chooses what to say of a request whose body was fed: why the body broke off, unless it broke off
/// because the engine had ended.
pub(crate) fn joined<A, B>(answered: Result<A, StepError>, fed: Result<B, StepError>) -> Result<(A, B), StepError> {
    match (answered, fed) {
        (Ok(answer), Ok(fed)) => Ok((answer, fed)),
        (Err(error), Err(fed)) if fed.message() == GONE => Err(error),
        (_, Err(fed)) => Err(fed),
        (Err(error), Ok(_)) => Err(error),
    }
}

/// Lets `work` read what the engine sends.
pub(crate) async fn consume<P: AsRef<[u8]> + Send + 'static, T: Send + 'static>(
    stream: impl Stream<Item = Result<P, bollard::errors::Error>>,
    cx: &Context,
    doing: &str,
    work: impl FnOnce(&mut dyn Read) -> Result<T, StepError> + Send + 'static,
) -> Result<T, StepError> {
    let mut stream = std::pin::pin!(stream);
    let (sender, receiver) = mpsc::channel(16);
    let working = blocking(move || work(&mut Incoming::new(receiver)));
    // The sender goes with it: its end is the reader's.
    let pumping = async move {
        loop {
            let piece = tokio::select! {
                piece = stream.next() => piece,
                () = cx.cancelled().cancelled() => return Err(cancelled()),
            };
            let Some(piece) = piece else { return Ok(()) };
            let piece = piece.doing(|| doing.to_owned())?;
            if sender.send(piece).await.is_err() {
                // Who reads has ended, with an error that says why.
                return Ok(());
            }
        }
    };
    let (pumped, worked) = tokio::join!(pumping, working);
    // An error of the engine ends the stream too early, and is the reason of what the reader says.
    pumped.and(worked)
}
