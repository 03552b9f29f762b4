//! Ctrl-C: once to stop, twice to roll back, three times to kill. SIGTERM stops.

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use upgrade_core::executor::Interrupt;

use crate::console::Console;
use crate::failure::Result;

/// Listens to signals until it is dropped.
pub(crate) struct Listening(JoinHandle<()>);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Listens to signals for as long as the process drives.
pub(crate) fn listen(interrupt: Interrupt, console: Console) -> Result<Listening> {
    let mut ctrl_c = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let listening = tokio::spawn(async move {
        let mut pulled = 0;
        loop {
            tokio::select! {
                Some(()) = ctrl_c.recv() => pulled += 1,
                // A service manager sends this once and kills later: a rollback would not fit.
                Some(()) = terminate.recv() => pulled = pulled.max(1),
                else => return,
            }
            match pulled {
                1 => {
                    interrupt.stop();
                    console.note("stopping after the running steps; once more cancels them and rolls back");
                }
                2 => {
                    interrupt.cancel();
                    console.note(
                        "cancelling and rolling back; once more kills this process: `upgrade resume` then goes on",
                    );
                }
                _ => kill(),
            }
        }
    });
    Ok(Listening(listening))
}

/// Ends the process as a crash does: nothing runs any more, and the next driver settles the rest.
fn kill() {
    if rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).is_err() {
        std::process::abort();
    }
}
