//! What an engine says while it builds: how far it is, and what it has made.

use std::collections::VecDeque;
use std::time::Duration;

use bollard::Docker;
use bollard::models::BuildInfo;
use tokio::time::sleep;
use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};

use super::Built;
use crate::containers;
use crate::error::{DockerError, found};
use crate::images;

/// How many lines an error carries.
const LINES: usize = 40;
/// What an engine needs to end the container of an instruction.
const ENDING: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);

/// Follows one build.
pub(super) struct Output<'a> {
    client: &'a Docker,
    cx: &'a Context,
    built: &'a Built,
    /// `Step 3/5 : RUN make`
    instruction: Option<String>,
    lines: VecDeque<String>,
    /// A line whose end has not come.
    begun: String,
    /// The container of the present instruction.
    container: Option<String>,
    id: Option<String>,
}

impl<'a> Output<'a> {
    pub(super) fn new(client: &'a Docker, cx: &'a Context, built: &'a Built) -> Self {
        let (instruction, lines, begun) = (None, VecDeque::new(), String::new());
        Self { client, cx, built, instruction, lines, begun, container: None, id: None }
    }

    /// Takes one piece of what the engine says.
    pub(super) async fn take(&mut self, event: &BuildInfo) -> Result<(), StepError> {
        if let Some(id) = event.aux.as_ref().and_then(|aux| aux.id.clone()) {
            self.id = Some(id);
        }
        if let Some(name) =
            event.status.as_deref().and_then(|status| status.strip_prefix("Status: Downloaded newer image for "))
            && let Some(image) = images::local(self.client, name).await?
        {
            self.keep(&images::id_of(&image)?).await?;
        }
        self.begun.push_str(event.stream.as_deref().unwrap_or_default());
        while let Some(end) = self.begun.find('\n') {
            let line: String = self.begun.drain(..=end).collect();
            self.line(line.trim_end()).await?;
        }
        Ok(())
    }

    async fn line(&mut self, line: &str) -> Result<(), StepError> {
        // Masked before it is cut: half a secret would not be recognised.
        let line: String = self.cx.mask(line).chars().take(400).collect();
        if let Some((done, total)) = instruction(&line) {
            self.cx.progress(done, total, line.as_str());
            (self.instruction, self.container) = (Some(line), None);
            return Ok(());
        }
        if let Some(rest) = line.strip_prefix(" ---> ") {
            if let Some(id) = rest.strip_prefix("Running in ") {
                self.container = Some(id.trim().to_owned());
            } else if is_id(rest)
                && let Some(image) = images::local(self.client, rest).await?
                && self.built.is_after(image.created.as_deref())
            {
                self.keep(&images::id_of(&image)?).await?;
            }
            return Ok(());
        }
        if !line.trim().is_empty() {
            self.cx.progress(0, None, line.as_str());
            self.lines.push_back(line);
            if self.lines.len() > LINES {
                self.lines.pop_front();
            }
        }
        Ok(())
    }

    async fn keep(&self, id: &str) -> Result<(), DockerError> {
        // One that somebody pruned already is built again, or was not needed.
        found(images::keep(self.client, self.cx, id).await).map(drop)
    }

    /// Says why a build failed: at which instruction, and what was printed last.
    pub(super) fn failed(&self, error: bollard::errors::Error) -> StepError {
        let doing = match &self.instruction {
            Some(instruction) => format!("building the image, at `{instruction}`,"),
            None => "building the image".to_owned(),
        };
        let error = StepError::from(DockerError::Engine { doing, source: error });
        let lines: Vec<_> = self
            .lines
            .iter()
            .map(String::as_str)
            .chain([self.cx.mask(&self.begun).as_str()])
            .map(str::to_owned)
            .collect();
        let said = lines.join("\n").trim().to_owned();
        let error = error.map_text(|text| self.cx.mask(text));
        let error = match error.class() {
            // What an instruction did, it does again.
            Class::Unknown => StepError::permanent(error.message()),
            _ => error,
        };
        let error = if said.is_empty() { error } else { error.with_detail(said) };
        if error.hint().is_some() {
            return error;
        }
        let hint = if error.message().contains("requires BuildKit") {
            "this is the engine's classic builder: write the Dockerfile without `RUN --mount`, or build it before and `load` or pull it"
        } else {
            "correct the Dockerfile or what it is built from: `docker build` shows the same"
        };
        error.with_hint(hint)
    }

    /// Returns the image that was built.
    pub(super) fn id(&self) -> Result<String, StepError> {
        self.id.clone().ok_or_else(|| {
            StepError::unknown("the engine ended the build and names no image")
                .with_hint("the connection may have been lost: look at the engine's log; `upgrade resume` builds again")
        })
    }

    /// Waits until the container of the instruction that ran last has ended; ends it if it does not.
    pub(super) async fn await_end(&self) {
        let Some(id) = &self.container else { return };
        let mut waited = Duration::ZERO;
        // Best effort: what counts is why the build failed.
        while let Ok(Some(_)) = containers::inspect(self.client, id).await {
            if waited >= ENDING {
                let _ = containers::remove(self.client, id, id, true).await;
                return;
            }
            sleep(POLL).await;
            waited += POLL;
        }
    }
}

/// Reads `Step 3/5 : RUN make`.
fn instruction(line: &str) -> Option<(u64, u64)> {
    let (counted, _) = line.strip_prefix("Step ")?.split_once(" : ")?;
    let (done, total) = counted.split_once('/')?;
    Some((done.parse().ok()?, total.parse().ok()?))
}

fn is_id(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}
