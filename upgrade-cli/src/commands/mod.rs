//! The commands, one file each.

mod audit;
mod commit;
mod completions;
mod history;
mod init;
mod man;
mod plan;
mod resolve;
mod resume;
mod rollback;
mod run;
mod schema;
mod status;
mod stop;
mod validate;
mod watch;

use clap::Subcommand;

use crate::failure::Result;
use crate::session::{Ending, Session};

/// What the command can be asked for.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Init(init::Init),
    Validate(validate::Validate),
    Plan(plan::Plan),
    Run(run::Run),
    Resume(resume::Resume),
    Watch(watch::Watch),
    Commit(commit::Commit),
    Rollback(rollback::Rollback),
    Resolve(resolve::Resolve),
    Stop(stop::Stop),
    Status(status::Status),
    History(history::History),
    Audit(audit::Audit),
    Schema(schema::Schema),
    Completions(completions::Completions),
    Man(man::Man),
}

impl Command {
    /// Returns the command's name, for the first line of JSON output.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Command::Init(_) => "init",
            Command::Validate(_) => "validate",
            Command::Plan(_) => "plan",
            Command::Run(_) => "run",
            Command::Resume(_) => "resume",
            Command::Watch(_) => "watch",
            Command::Commit(_) => "commit",
            Command::Rollback(_) => "rollback",
            Command::Resolve(_) => "resolve",
            Command::Stop(_) => "stop",
            Command::Status(_) => "status",
            Command::History(_) => "history",
            Command::Audit(_) => "audit",
            Command::Schema(_) => "schema",
            Command::Completions(_) => "completions",
            Command::Man(_) => "man",
        }
    }

    /// Tells whether the result is a document of a format of its own, whatever `--output` says.
    pub(crate) fn is_document(&self) -> bool {
        match self {
            Command::Schema(_) | Command::Completions(_) | Command::Man(_) => true,
            Command::Audit(audit) => audit.is_document(),
            Command::Watch(watch) => watch.is_document(),
            _ => false,
        }
    }

    /// Does what was asked.
    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        match self {
            Command::Init(command) => command.execute(session),
            Command::Validate(command) => command.execute(session),
            Command::Plan(command) => command.execute(session),
            Command::Run(command) => command.execute(session),
            Command::Resume(command) => command.execute(session),
            Command::Watch(command) => command.execute(session),
            Command::Commit(command) => command.execute(session),
            Command::Rollback(command) => command.execute(session),
            Command::Resolve(command) => command.execute(session),
            Command::Stop(command) => command.execute(session),
            Command::Status(command) => command.execute(session),
            Command::History(command) => command.execute(session),
            Command::Audit(command) => command.execute(session),
            Command::Schema(command) => command.execute(session),
            Command::Completions(command) => command.execute(session),
            Command::Man(command) => command.execute(session),
        }
    }
}
