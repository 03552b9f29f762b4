//! `upgrade man`: prints the manual page.

use clap::{Args, CommandFactory};

use crate::arguments::Cli;
use crate::console::document;
use crate::failure::{Failure, Result};
use crate::session::{Ending, Session};

const EXAMPLES: &str = "\
Examples:
  upgrade man | man -l -
  upgrade man > /usr/local/share/man/man1/upgrade.1
  upgrade man rollback > /usr/local/share/man/man1/upgrade-rollback.1";

/// Print the manual page of the command, or of one of its commands.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Man {
    /// The command that the page is about.
    #[arg(value_name = "COMMAND")]
    command: Option<String>,
}

impl Man {
    pub(crate) fn execute(self, _: &Session) -> Result<Ending> {
        let mut root = Cli::command();
        // Global options stand on every page only once the tree is built.
        root.build();
        let command = match &self.command {
            None => root,
            Some(name) => root.find_subcommand(name).cloned().ok_or_else(|| {
                Failure::usage(format!("there is no command `{name}`")).with_hint("`upgrade --help` lists them")
            })?,
        };
        let mut text = Vec::new();
        clap_mangen::Man::new(command).render(&mut text)?;
        document(&text)?;
        Ok(Ending::new("printed"))
    }
}
