//! A way to reach what this machine has no route to: a database that only a cluster or a
//! container network knows.

use std::net::SocketAddr;

use async_trait::async_trait;

use crate::context::Context;
use crate::error::StepError;

/// Reaches a host and port of another network through an address of this machine.
///
/// An adapter's target is one as well where it can forward ports: a database target then names it
/// (`via: cluster`) and connects through it.
///
/// # Guarantees
/// What is sent to the address of an open tunnel arrives at the host and port that were asked for,
/// until its [`Passage`] is dropped.
///
/// # Assumptions
/// `open` may be called many times, and at once; each passage stands for itself. It listens on
/// loopback only.
///
/// # Errors
/// The way cannot be opened: *transient* where it may pass. A passage that breaks later shows as a
/// lost connection to whoever uses it.
#[async_trait]
pub trait Tunnel: Send + Sync + 'static {
    /// Opens a way to `host` and `port` as the other side knows them.
    async fn open(&self, cx: &Context, host: &str, port: u16) -> Result<Passage, StepError>;
}

/// Holds a way open; dropped, it is closed.
pub struct Passage {
    address: SocketAddr,
    _hold: Box<dyn Send + Sync>,
}

impl Passage {
    /// Makes a passage that stays open as long as `hold` is kept.
    pub fn new(address: SocketAddr, hold: impl Send + Sync + 'static) -> Self {
        Self { address, _hold: Box::new(hold) }
    }

    /// Returns where on this machine it begins.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl std::fmt::Debug for Passage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Passage").field("address", &self.address).finish_non_exhaustive()
    }
}
