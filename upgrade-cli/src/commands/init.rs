//! `upgrade init`: writes a first pipeline file.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use crate::exit::Exit;
use crate::failure::{Failure, Result};
use crate::session::{Ending, Session};

const EXAMPLES: &str = "\
Examples:
  upgrade init
  upgrade init deploy/upgrade.yaml && upgrade plan deploy/upgrade.yaml";

const TEMPLATE: &str = include_str!("init.yaml");

/// Write a commented pipeline file to begin with; never over another file.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Init {
    /// Where to write it.
    #[arg(value_name = "FILE", default_value = "upgrade.yaml")]
    file: PathBuf,
}

impl Init {
    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        let file = self.file.display();
        let written = OpenOptions::new().write(true).create_new(true).open(&self.file).and_then(|mut new| {
            new.write_all(TEMPLATE.as_bytes())?;
            new.sync_all()
        });
        match written {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                return Err(Failure::refused(format!("{file} is already there"))
                    .with_hint("name another file: `upgrade init FILE`"));
            }
            Err(error) => {
                return Err(Failure::internal(format!("cannot write {file}"))
                    .with_cause(&error)
                    .with_hint("check that the directory is there and may be written to"));
            }
        }
        session.console.line(format_args!("wrote {file}; `upgrade plan {file}` shows what it would do"))?;
        Ok(Ending::with(Exit::Done, json!({ "outcome": "written", "file": self.file })))
    }
}
