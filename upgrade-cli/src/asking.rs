//! Asks something of an open run: drives it, or has its driver do it and follows.

use std::sync::Arc;

use serde_json::json;
use upgrade_core::entry::Demand;
use upgrade_core::executor::{Answer, RunOptions};
use upgrade_core::journal::Journal;

use crate::exit::{Asked, Exit};
use crate::failure::{Failure, Result};
use crate::recorded::{Recorded, Until, follow};
use crate::render::Title;
use crate::render::narrator::Narrator;
use crate::session::{Ending, Session};

/// Asks `demand` of a run and stays until it has come of it, unless told not to.
pub(crate) async fn ask(
    session: &Session,
    journal: Arc<dyn Journal>,
    recorded: &Recorded,
    demand: Demand,
    asked: Asked,
    detach: bool,
) -> Result<Ending> {
    let pipeline = recorded.pipeline()?;
    let title = Title::from(recorded.run.header());
    let id = recorded.run.id();
    let options = RunOptions { detach, ..RunOptions::default() };
    let driver = session.driver(journal.clone(), &recorded.base_dir())?;
    let answer = driver.executor.demand(&pipeline, id, demand, &options, &driver.interrupt).await;
    match driver.finish(answer)? {
        Answer::Driven(report) => session.end(&report, &title, asked),
        Answer::Refused { message } => {
            Err(Failure::refused(message).with_hint(format!("`upgrade status {id}` shows where the run stands")))
        }
        Answer::Granted if detach => {
            session.console.line(format_args!("the driver of {title} took the request up (run {id})"))?;
            Ok(Ending::with(Exit::Done, json!({ "run": id, "outcome": "granted" })))
        }
        Answer::Granted => {
            let mut narrator = Narrator::new(session.console);
            let curtain = narrator.curtain();
            let seen = recorded.run.entries();
            let report = tokio::select! {
                report = follow(&journal, id, seen, &mut narrator, Until::SettledByDriver) => report,
                _ = tokio::signal::ctrl_c() => Err(Failure::new(Exit::Open, "no longer following; the driver goes on")
                    .with_hint(format!("`upgrade status {id} --watch` follows it"))),
            };
            drop(curtain);
            session.end(&report?, &title, asked)
        }
    }
}
