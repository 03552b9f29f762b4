//! Asks a service whether it is active, and brings it there: through systemctl or its own commands.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::units::Span;

use crate::process::program::{Ended, Program, Role, line};
use upgrade_core::text_or_secret::TextOrSecret;

/// Tells whether a service runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Activity {
    Active,
    Inactive,
    /// On its way from one to the other.
    Changing,
}

/// Says what is done to a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Start,
    Stop,
    Restart,
}

impl Verb {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Restart => "restart",
        }
    }
}

/// Knows how a service is reached.
#[derive(Debug, Clone)]
pub(crate) struct ServiceControl {
    pub(crate) unit: Option<String>,
    pub(crate) systemctl: Vec<String>,
    pub(crate) start: Vec<String>,
    pub(crate) stop: Vec<String>,
    pub(crate) status: Vec<String>,
    pub(crate) wait: Duration,
    pub(crate) env: BTreeMap<String, TextOrSecret>,
    pub(crate) directory: PathBuf,
    pub(crate) log: Option<PathBuf>,
}

impl ServiceControl {
    const POLL: Duration = Duration::from_millis(100);

    /// Names the service: its unit, else the command that starts it.
    pub(crate) fn name(&self) -> String {
        self.unit.clone().unwrap_or_else(|| line(&self.start))
    }

    /// Brings the service to where `verb` leads and waits until it is there; starting what is
    /// active and stopping what is inactive does nothing.
    pub(crate) async fn bring(&self, cx: &Context, verb: Verb) -> Result<(), StepError> {
        let now = self.settled_activity(cx).await?;
        let said = match (verb, now, &self.unit) {
            (Verb::Start, Activity::Active, _) | (Verb::Stop, Activity::Inactive, _) => return Ok(()),
            (verb, _, Some(unit)) => self.call(cx, &self.of_unit(verb.name(), unit), Role::Step).await?,
            (Verb::Stop, ..) => self.call(cx, &self.stop, Role::Step).await?,
            (Verb::Restart, Activity::Active, None) => {
                let said = self.call(cx, &self.stop, Role::Step).await?;
                self.until(cx, Activity::Inactive, &said).await?;
                self.call(cx, &self.start, Role::Starter { log: self.log.clone() }).await?
            }
            (Verb::Start | Verb::Restart, ..) => {
                self.call(cx, &self.start, Role::Starter { log: self.log.clone() }).await?
            }
        };
        let goal = if verb == Verb::Stop { Activity::Inactive } else { Activity::Active };
        self.until(cx, goal, &said).await
    }

    /// Returns whether the service is active, once it is not changing any more.
    pub(crate) async fn settled_activity(&self, cx: &Context) -> Result<Activity, StepError> {
        let end = Instant::now() + self.wait;
        loop {
            match self.activity(cx).await? {
                Activity::Changing if Instant::now() < end => sleep(Self::POLL).await,
                Activity::Changing => {
                    return Err(StepError::transient(format!(
                        "service {} is neither active nor inactive after {}",
                        self.name(),
                        Span(self.wait)
                    ))
                    .with_hint(self.where_to_look()));
                }
                settled => return Ok(settled),
            }
        }
    }

    async fn until(&self, cx: &Context, goal: Activity, said: &Ended) -> Result<(), StepError> {
        let end = Instant::now() + self.wait;
        while self.activity(cx).await? != goal {
            if Instant::now() >= end {
                let goal = if goal == Activity::Active { "active" } else { "inactive" };
                let message = format!("service {} is not {goal} after {}", self.name(), Span(self.wait));
                return Err(StepError::permanent(message).with_detail(said.detail()).with_hint(self.where_to_look()));
            }
            sleep(Self::POLL).await;
        }
        Ok(())
    }

    async fn activity(&self, cx: &Context) -> Result<Activity, StepError> {
        let Some(unit) = &self.unit else {
            let ended = self.program(&self.status, Role::Step).run(cx).await?;
            return match ended.code {
                Some(0) => Ok(Activity::Active),
                Some(_) => Ok(Activity::Inactive),
                None => Err(self.failure(&self.status, &ended)),
            };
        };
        let argv = self.of_unit("show", unit);
        let ended = self.program(&argv, Role::Step).run(cx).await?;
        let property = |name: &str| {
            let mut lines = ended.stdout.lines();
            lines.find_map(|line| line.trim().strip_prefix(name)?.strip_prefix('='))
        };
        match (property("LoadState"), property("ActiveState")) {
            // A mistyped unit would otherwise pass for one that is stopped.
            (Some("not-found"), Some("inactive")) => Err(StepError::permanent(format!("there is no unit {unit}"))
                .with_hint(format!("check the name with `{} list-unit-files`", line(&self.systemctl)))),
            (_, Some("active" | "reloading" | "refreshing")) => Ok(Activity::Active),
            (_, Some("inactive" | "failed")) => Ok(Activity::Inactive),
            (_, Some(_)) => Ok(Activity::Changing),
            (_, None) => Err(self.failure(&argv, &ended)),
        }
    }

    fn of_unit(&self, verb: &str, unit: &str) -> Vec<String> {
        let properties: &[&str] =
            if verb == "show" { &["--property=LoadState", "--property=ActiveState"] } else { &[] };
        let words = [&[verb], properties, &["--", unit]].concat();
        self.systemctl.iter().cloned().chain(words.into_iter().map(str::to_owned)).collect()
    }

    async fn call(&self, cx: &Context, argv: &[String], role: Role) -> Result<Ended, StepError> {
        let starts = matches!(role, Role::Starter { .. });
        let ended =
            self.program(argv, role).run(cx).await.map_err(|error| match starts && cx.cancelled().is_cancelled() {
                true => error.with_hint(
                    "`start` must return while the service goes on: `[setsid, -f, program]`, or let systemd run it",
                ),
                false => error,
            })?;
        if ended.code == Some(0) { Ok(ended) } else { Err(self.failure(argv, &ended)) }
    }

    fn program(&self, argv: &[String], role: Role) -> Program {
        Program { argv: argv.to_vec(), env: self.env.clone(), directory: self.directory.clone(), role }
    }

    fn failure(&self, argv: &[String], ended: &Ended) -> StepError {
        let message = format!("`{}` ended with {}", line(argv), ended.how());
        let error = if ended.code.is_some() { StepError::permanent(message) } else { StepError::unknown(message) };
        error.with_detail(ended.detail()).with_hint(self.where_to_look())
    }

    fn where_to_look(&self) -> String {
        match (&self.unit, &self.log) {
            (Some(unit), _) => format!("read `journalctl -u {unit} -e` and `{} status {unit}`", line(&self.systemctl)),
            (None, Some(log)) => format!("read {}", log.display()),
            (None, None) => format!("run `{}` by hand and read what it says", line(&self.start)),
        }
    }
}
