//! A step of one's own, with its undo, and a check.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use upgrade_core::check::Check;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{CheckError, Conflict, StepError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::verdict::Verdict;
use upgrade_host::machine::MachineTarget;

/// Points a symbolic link at the data that the new version reads.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PointLink {
    /// The link.
    pub link: PathBuf,
    /// Where it shall lead.
    pub target: PathBuf,
}

/// Holds where the link led, and where it shall lead.
#[derive(Debug, Serialize, Deserialize)]
pub struct Leads {
    found: PathBuf,
    intended: PathBuf,
}

#[async_trait]
impl Step for PointLink {
    const KIND: &'static str = "example.link";
    type Undo = Leads;
    type Output = ();

    async fn prepare(&self, _cx: &Context) -> Result<Prepared<Leads, ()>, StepError> {
        let found = fs::read_link(&self.link).map_err(|error| self.failed(&error))?;
        if found == self.target {
            return Ok(Prepared::unchanged((), "the link leads there already"));
        }
        let change = Change::new(Effect::Modify, self.link.to_string_lossy());
        Ok(Prepared::change(Leads { found, intended: self.target.clone() }, [change]))
    }

    async fn apply(&self, cx: &Context, leads: &Leads) -> Result<(), StepError> {
        self.point(cx, leads, &leads.intended)
    }

    fn definition(&self) -> Value {
        json!(self)
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![MachineTarget::path(&self.link)]
    }
}

#[async_trait]
impl Rollback for PointLink {
    async fn rollback(&self, cx: &Context, leads: &Leads, _output: Option<&()>) -> Result<(), StepError> {
        self.point(cx, leads, &leads.found)
    }
}

impl PointLink {
    /// Points the link, unless somebody else did; converges.
    fn point(&self, cx: &Context, leads: &Leads, to: &Path) -> Result<(), StepError> {
        let present = fs::read_link(&self.link).map_err(|error| self.failed(&error))?;
        if ![&leads.found, &leads.intended].contains(&&present) && cx.on_conflict() == OnConflict::Stop {
            let [subject, found, intended, present] =
                [&self.link, &leads.found, &leads.intended, &present].map(|path| path.display().to_string());
            return Err(StepError::conflict(Conflict { subject, found, intended, present }));
        }
        switch(&self.link, to).map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &io::Error) -> StepError {
        StepError::permanent(format!("{} cannot be read or changed as a link", self.link.display()))
            .with_cause(error)
            .with_hint("look at what is there: it must be a symbolic link in a directory that can be written")
    }
}

/// Switches a link at once and durably: it leads to the old or to the new target at any instant.
fn switch(link: &Path, to: &Path) -> io::Result<()> {
    let beside = link.with_extension("new-link");
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::os::unix::fs::symlink(to, &beside)?;
    fs::rename(&beside, link)?;
    fs::File::open(link.parent().unwrap_or(Path::new(".")))?.sync_all()
}

/// Passes if what a link leads to holds a text.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LeadsTo {
    /// The link.
    pub link: PathBuf,
    /// The text.
    pub text: String,
}

#[async_trait]
impl Check for LeadsTo {
    async fn check(&self, _cx: &Context) -> Result<Verdict, CheckError> {
        // What cannot be read is not measured: the verdict is *unknown*, never a pass.
        let content = tokio::fs::read_to_string(&self.link).await.map_err(|error| {
            CheckError::transient(format!("{} cannot be read", self.link.display())).with_cause(&error)
        })?;
        let verdict = if content.contains(&self.text) {
            Verdict::pass(format!("`{}` is there", self.text))
        } else {
            Verdict::fail(format!("`{}` is not in what the link leads to", self.text))
        };
        Ok(verdict.with_measurement("bytes", content.len() as f64))
    }

    fn kind(&self) -> &str {
        "example.leads_to"
    }

    fn definition(&self) -> Value {
        json!(self)
    }
}
