//! `upgrade completions`: prints the completions of a shell.

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use crate::arguments::Cli;
use crate::console::document;
use crate::failure::Result;
use crate::session::{Ending, Session};

const EXAMPLES: &str = "\
Examples:
  upgrade completions bash > /etc/bash_completion.d/upgrade
  upgrade completions zsh > ~/.zfunc/_upgrade
  upgrade completions fish > ~/.config/fish/completions/upgrade.fish";

/// Print the completions of a shell.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Completions {
    /// The shell.
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

impl Completions {
    pub(crate) fn execute(self, _: &Session) -> Result<Ending> {
        let mut text = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "upgrade", &mut text);
        document(&text)?;
        Ok(Ending::new("printed"))
    }
}
