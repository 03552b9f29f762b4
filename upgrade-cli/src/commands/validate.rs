//! `upgrade validate`: reads a pipeline file and says what is wrong with it.

use clap::Args;
use serde_json::json;

use crate::arguments::PipelineFile;
use crate::exit::Exit;
use crate::failure::Result;
use crate::render::Title;
use crate::session::{Ending, Session};

const EXAMPLES: &str = "\
Examples:
  upgrade validate upgrade.yaml
  upgrade validate upgrade.yaml --env production --to 1.1.0 --var root=/srv/notes";

/// Read a pipeline file and say what is wrong with it; ask and change nothing.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Validate {
    #[command(flatten)]
    pipeline: PipelineFile,
}

impl Validate {
    pub(crate) fn execute(self, session: &Session) -> Result<Ending> {
        let pipeline = session.load(&self.pipeline)?;
        let steps = pipeline.graph().order();
        let file = self.pipeline.file.display();
        let plural = if steps.len() == 1 { "" } else { "s" };
        session.console.line(format_args!(
            "{file}: {} is valid, {} step{plural}",
            Title::from(&pipeline),
            steps.len()
        ))?;
        let object = json!({
            "outcome": "valid",
            "pipeline": pipeline.name(),
            "environment": pipeline.environment(),
            "to": pipeline.to(),
            "steps": steps,
        });
        Ok(Ending::with(Exit::Done, object))
    }
}
