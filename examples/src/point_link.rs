//! A step of one's own, with its undo, and a check.

use std::path::{Path, PathBuf};
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
    /// The link; made if it is not there.
    pub link: PathBuf,
    /// Where it shall lead.
    pub target: PathBuf,
}

/// Holds where the link led, and where it shall lead.
#[derive(Debug, Serialize, Deserialize)]
pub struct Leads {
    found: Option<PathBuf>,
    intended: Option<PathBuf>,
}

#[async_trait]
impl Step for PointLink {
    const KIND: &'static str = "example.link";
    type Undo = Leads;
    type Output = PathBuf;

    async fn prepare(&self, _cx: &Context) -> Result<Prepared<Leads, PathBuf>, StepError> {
        let leads = Leads { found: self.present()?, intended: Some(self.target.clone()) };
        if leads.found == leads.intended {
            return Ok(Prepared::unchanged(self.target.clone(), "the link leads there already"));
        }
        let summary = format!("-> {}", self.target.display());
        Ok(Prepared::change(leads, [Change::new(Effect::Modify, self.link.to_string_lossy()).with_summary(summary)]))
    }

    async fn apply(&self, cx: &Context, leads: &Leads) -> Result<PathBuf, StepError> {
        self.point(cx, leads, leads.intended.as_deref())?;
        Ok(self.target.clone())
    }

    fn definition(&self) -> Value {
        json!(self)
    }

    fn targets(&self) -> Vec<std::sync::Arc<dyn Target>> {
        vec![MachineTarget::path(&self.link)]
    }
}

#[async_trait]
impl Rollback for PointLink {
    async fn rollback(&self, cx: &Context, leads: &Leads, _output: Option<&PathBuf>) -> Result<(), StepError> {
        self.point(cx, leads, leads.found.as_deref())
    }
}

impl PointLink {
    fn present(&self) -> Result<Option<PathBuf>, StepError> {
        match fs::read_link(&self.link) {
            Ok(target) => Ok(Some(target)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failed(&error)),
        }
    }

    /// Changes the link only where it leads to what was found or what is intended; converges.
    fn point(&self, cx: &Context, leads: &Leads, to: Option<&Path>) -> Result<(), StepError> {
        let present = self.present()?;
        let foreign = present != leads.found && present != leads.intended;
        if foreign && cx.on_conflict() == OnConflict::Stop {
            let text = |target: &Option<PathBuf>| target.as_ref().map_or("no link".into(), |t| t.display().to_string());
            return Err(StepError::conflict(Conflict {
                subject: self.link.display().to_string(),
                found: text(&leads.found),
                intended: text(&leads.intended),
                present: text(&present),
            }));
        }
        replace(&self.link, to).map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &io::Error) -> StepError {
        StepError::permanent(format!("{} cannot be read or changed as a link", self.link.display()))
            .with_cause(error)
            .with_hint("look at what is there: it must be a symbolic link in a directory that can be written")
    }
}

/// Replaces a link at once and durably: it leads to the old or to the new target at any instant.
fn replace(link: &Path, to: Option<&Path>) -> io::Result<()> {
    let temporary = link.with_extension("new-link");
    match (fs::remove_file(&temporary), to) {
        (Err(error), _) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        (_, Some(target)) => {
            std::os::unix::fs::symlink(target, &temporary)?;
            fs::rename(&temporary, link)?;
        }
        (_, None) => match fs::remove_file(link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        },
    }
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
