//! A container that runs one command to its end, and is itself the record of how that ended.
//!
//! Its name is the step's own and it stays until the step is committed or undone: whoever takes
//! over after a crash finds it, awaits it and reads its exit code, and never starts another.
//!
//! ```text
//! absent -> made -> running -> ended
//!    |        |
//!    |        '-> never ran: the engine could not start it
//!    '-> never ran: the engine refused to make it, and holds an empty one in its place
//! ```

use std::collections::HashMap;
use std::time::Duration;

use bollard::Docker;
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, EndpointSettings, HostConfig, NetworkConnectRequest,
    NetworkingConfig,
};
use bollard::query_parameters::CreateContainerOptionsBuilder;
use tokio::time::sleep;
use upgrade_core::context::Context;
use upgrade_core::error::{Class, Conflict, StepError};

use crate::containers::{self, grace_of, id_of, is_running};
use crate::error::{DockerError, Doing, cancelled, not_cancelled};
use crate::mounts::MountSpec;
use crate::naming::{MARKER, labels, mark};
use crate::printed::{self, Printed};

/// The label of a container that only says that the real one could not be made.
const REFUSED: &str = "io.github.upgrade-rs.refused";
const POLL: Duration = Duration::from_millis(50);
const LONGEST_POLL: Duration = Duration::from_secs(1);

/// Says what runs in the container.
#[derive(Debug, Clone, Default)]
pub(crate) struct Spec {
    /// The id of the image.
    pub(crate) image: String,
    pub(crate) command: Vec<String>,
    pub(crate) entrypoint: Vec<String>,
    /// `NAME=value`, secrets among them: shown nowhere.
    pub(crate) env: Vec<String>,
    pub(crate) networks: Vec<String>,
    pub(crate) volumes: Vec<MountSpec>,
    pub(crate) user: Option<String>,
    pub(crate) directory: Option<String>,
}

/// Says how a one-off container is.
#[derive(Debug)]
pub(crate) enum Standing {
    Absent,
    /// It is certain that its command never ran.
    NeverRan(Box<ContainerInspectResponse>),
    /// It was made; a request to start it may be under way.
    Made(Box<ContainerInspectResponse>),
    Running(Box<ContainerInspectResponse>),
    Ended(Box<ContainerInspectResponse>),
}

/// A one-off container of the step that is called.
pub(crate) struct OneOff<'a> {
    pub(crate) client: &'a Docker,
    pub(crate) cx: &'a Context,
    name: String,
    /// What it is for, as messages name it: `the command`.
    what: &'static str,
}

/// Tells how a one-off container ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i64,
    pub(crate) out_of_memory: bool,
    pub(crate) printed: Printed,
}

impl<'a> OneOff<'a> {
    /// Names the container; `role` tells several of one step apart.
    pub(crate) fn new(client: &'a Docker, cx: &'a Context, role: &str, what: &'static str) -> Self {
        Self { client, cx, name: format!("upgrade-{role}-{}", mark(cx)), what }
    }

    /// Looks how it is.
    pub(crate) async fn standing(&self) -> Result<Standing, StepError> {
        let Some(found) = containers::inspect(self.client, &self.name).await? else { return Ok(Standing::Absent) };
        let labels = found.config.as_ref().and_then(|config| config.labels.as_ref());
        let label = |name: &str| labels.and_then(|labels| labels.get(name)).map(String::as_str);
        if label(MARKER) != Some(&self.cx.marker()) {
            return Err(StepError::conflict(Conflict {
                subject: format!("container {}", self.name),
                found: "none".into(),
                intended: "one of this step".into(),
                present: "one of somebody else's".into(),
            }));
        }
        let state = found.state.as_ref();
        let never_started = state.and_then(|state| state.started_at.as_deref()).is_none_or(|at| at.starts_with("0001"));
        let said = state.and_then(|state| state.error.as_deref()).is_some_and(|error| !error.is_empty());
        let refused = label(REFUSED).is_some();
        let found = Box::new(found);
        Ok(match (is_running(&found), never_started) {
            (true, _) => Standing::Running(found),
            (false, false) => Standing::Ended(found),
            (false, true) if said || refused => Standing::NeverRan(found),
            (false, true) => Standing::Made(found),
        })
    }

    /// Runs the command to its end, once: one that was made, runs or ended is taken for what it is.
    ///
    /// # Errors
    /// It could not be made or started, or the call was cancelled: it has been ended and removed then.
    pub(crate) async fn run(&self, spec: &Spec) -> Result<Ended, StepError> {
        let mut standing = self.standing().await?;
        if let Standing::NeverRan(found) = &standing {
            containers::remove(self.client, id_of(found), &self.name, true).await?;
            standing = Standing::Absent;
        }
        let id = match &standing {
            Standing::Absent | Standing::NeverRan(_) => {
                not_cancelled(self.cx)?;
                self.make(spec).await?
            }
            Standing::Made(found) | Standing::Running(found) | Standing::Ended(found) => id_of(found).to_owned(),
        };
        if matches!(standing, Standing::Absent | Standing::Made(_)) {
            not_cancelled(self.cx)?;
            self.connect(&id, spec).await?;
            containers::start(self.client, &id, &self.name).await.map_err(|error| self.not_started(error))?;
        }
        let ended = Box::pin(self.wait(&id)).await?;
        let state = ended.state.as_ref();
        Ok(Ended {
            code: state.and_then(|state| state.exit_code).unwrap_or(-1),
            out_of_memory: state.and_then(|state| state.oom_killed).unwrap_or(false),
            printed: printed::of_container(self.client, self.cx, &id).await,
        })
    }

    fn not_started(&self, error: DockerError) -> StepError {
        let lost = error.is_connection_lost();
        let error = StepError::from(error);
        if lost || error.hint().is_some_and(|hint| hint.starts_with("free ")) {
            return error;
        }
        error.with_hint("check `command`, `entrypoint`, `user`, `networks` and `volumes` against the image")
    }

    async fn make(&self, spec: &Spec) -> Result<String, StepError> {
        let first = spec.networks.first();
        let networking = first.filter(|network| !is_mode(network)).map(|network| NetworkingConfig {
            endpoints_config: Some(HashMap::from([(network.clone(), EndpointSettings::default())])),
        });
        let given = |list: &[String]| (!list.is_empty()).then(|| list.to_vec());
        let body = ContainerCreateBody {
            image: Some(spec.image.clone()),
            cmd: given(&spec.command),
            entrypoint: given(&spec.entrypoint),
            env: given(&spec.env),
            user: spec.user.clone(),
            working_dir: spec.directory.clone(),
            labels: Some(labels(self.cx)),
            networking_config: networking,
            host_config: Some(HostConfig {
                network_mode: first.cloned(),
                mounts: Some(spec.volumes.iter().map(MountSpec::mount).collect()),
                ..HostConfig::default()
            }),
            ..ContainerCreateBody::default()
        };
        let error = match self.create(body).await {
            Ok(id) => return Ok(id),
            Err(error) => error,
        };
        // What the engine refused to make never ran: that must be known when it is undone.
        if error.status().is_some_and(|status| status < 500 && status != 409) {
            let mut labels = labels(self.cx);
            labels.insert(REFUSED.into(), "true".into());
            let bare = ContainerCreateBody {
                image: Some(spec.image.clone()),
                cmd: Some(vec!["none".into()]),
                labels: Some(labels),
                ..ContainerCreateBody::default()
            };
            self.create(bare).await?;
        }
        Err(self.not_started(error))
    }

    async fn create(&self, body: ContainerCreateBody) -> Result<String, DockerError> {
        let options = CreateContainerOptionsBuilder::new().name(&self.name).build();
        let made = self.client.create_container(Some(options), body).await;
        Ok(made.doing(|| format!("making the container for {}", self.what))?.id)
    }

    /// Connects it to all networks but the first, which it was made with.
    async fn connect(&self, id: &str, spec: &Spec) -> Result<(), StepError> {
        for network in spec.networks.iter().skip(1) {
            let found = containers::inspect(self.client, id).await?.unwrap_or_default();
            let networks = found.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
            if networks.contains_key(network) {
                continue;
            }
            let request = NetworkConnectRequest { container: id.to_owned(), endpoint_config: None };
            let doing = || format!("connecting the container for {} to network {network}", self.what);
            self.client.connect_network(network, request).await.doing(doing)?;
        }
        Ok(())
    }

    /// Awaits its end, its lines shown as progress.
    async fn wait(&self, id: &str) -> Result<ContainerInspectResponse, StepError> {
        let ended = async {
            let mut pause = POLL;
            loop {
                let found = containers::inspect(self.client, id).await?.ok_or_else(|| self.gone())?;
                if !is_running(&found) {
                    return Ok(found);
                }
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_POLL);
            }
        };
        // Its last lines come at about its end, and are waited for shortly.
        let (over, mut seen) = tokio::sync::oneshot::channel::<()>();
        let shown = async {
            let shown = printed::follow(self.client, self.cx, id);
            tokio::select! {
                () = shown => {}
                () = async { let _ = (&mut seen).await; sleep(LONGEST_POLL).await } => {}
            }
        };
        let ended = async {
            let ended = ended.await;
            drop(over);
            ended
        };
        tokio::select! {
            (ended, ()) = async { tokio::join!(ended, shown) } => ended,
            () = self.cx.cancelled().cancelled() => {
                // It may have ended by itself just now.
                if let Standing::Ended(found) = self.standing().await? {
                    return Ok(*found);
                }
                let printed = self.end().await?;
                // Cut off, it is no record for another attempt.
                self.remove().await?;
                Err(cancelled().with_detail(printed.map(|printed| printed.detail()).unwrap_or_default()))
            }
        }
    }

    fn gone(&self) -> StepError {
        StepError::unknown(format!("container {} is gone: somebody removed it while it ran", self.name))
            .with_hint("find out who removes containers here (`docker events`); nobody knows how far it came")
    }

    /// Ends it if it runs, and returns what it printed.
    pub(crate) async fn end(&self) -> Result<Option<Printed>, StepError> {
        let found = match self.standing().await? {
            Standing::Absent | Standing::NeverRan(_) => return Ok(None),
            Standing::Made(found) | Standing::Running(found) | Standing::Ended(found) => found,
        };
        // Also one that does not run yet: a start under way is ended once it is through.
        containers::stop(self.client, id_of(&found), &self.name, grace_of(&found)).await?;
        Ok(Some(printed::of_container(self.client, self.cx, id_of(&found)).await))
    }

    /// Removes it, with its anonymous volumes. One that does not exist is left alone.
    pub(crate) async fn remove(&self) -> Result<(), StepError> {
        match self.standing().await? {
            Standing::Absent => Ok(()),
            Standing::NeverRan(found) | Standing::Made(found) | Standing::Running(found) | Standing::Ended(found) => {
                Ok(containers::remove(self.client, id_of(&found), &self.name, true).await?)
            }
        }
    }
}

/// Tells what stands in place of a network from the name of one.
pub(crate) fn is_mode(network: &str) -> bool {
    matches!(network, "none" | "host" | "bridge" | "default") || network.starts_with("container:")
}

impl Ended {
    /// Says in a few words how it ended.
    pub(crate) fn how(&self) -> String {
        let memory = if self.out_of_memory { " (out of memory)" } else { "" };
        format!("exit code {}{memory}", self.code)
    }

    /// Describes an end that is not a success: 75 (`EX_TEMPFAIL`) is worth another try, and after
    /// a signal nobody knows what was done.
    pub(crate) fn failure(&self, line: &str) -> StepError {
        let class = match self.code {
            75 => Class::Transient,
            137 | 143 if !self.out_of_memory => Class::Unknown,
            _ => Class::Permanent,
        };
        let error = StepError::new(class, format!("`{line}` ended with {}", self.how()));
        let detail = self.printed.detail();
        let error = if detail.is_empty() { error } else { error.with_detail(detail) };
        error.with_hint(match self.code {
            _ if self.out_of_memory => {
                "give the engine's machine more memory, or the command less to do, and run again"
            }
            126 | 127 => "the program is not there, or may not be run: check `command`, and `entrypoint` if it has one",
            137 | 143 => "it was ended from outside: look at `docker events` and the kernel's log, then run again",
            _ => "read what it said, mend that, and run it by hand to see it pass",
        })
    }
}
