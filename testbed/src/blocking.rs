//! Asynchronous calls from tests that may or may not be inside a runtime.

/// Runs something to its end on a thread of its own, so that it works inside a runtime too.
pub(crate) fn wait<T: Send>(work: impl AsyncFnOnce() -> T + Send) -> T {
    let run = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime can be made")
            .block_on(work())
    };
    std::thread::scope(|scope| match scope.spawn(run).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
