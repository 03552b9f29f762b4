//! `upgrade schema`: prints the JSON Schema of pipeline files.

use clap::Args;
use upgrade_core::file;

use crate::console::document;
use crate::failure::Result;
use crate::session::{Ending, Session, registry};

const EXAMPLES: &str = "\
Examples:
  upgrade schema > upgrade.schema.json
  # then, as the first line of a pipeline file:
  # yaml-language-server: $schema=upgrade.schema.json";

/// Print the JSON Schema of pipeline files, with every kind that is built in.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Schema {}

impl Schema {
    pub(crate) fn execute(self, _: &Session) -> Result<Ending> {
        let mut text = format!("{:#}", file::schema(&registry()));
        text.push('\n');
        document(text.as_bytes())?;
        Ok(Ending::new("printed"))
    }
}
