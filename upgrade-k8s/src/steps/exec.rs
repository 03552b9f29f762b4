//! `k8s.exec`: runs a command inside a container of a pod that runs, and another one to undo it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::AnyStep;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::secret::ExposeSecret as _;
use upgrade_core::step::{Change, Effect, Prepared, Step};
use upgrade_core::target::Target;
use upgrade_core::text_or_secret::TextOrSecret;
use upgrade_core::undoable::{OptionalRollback, Undoable};

use crate::inside::{Inside, Program};
use crate::kind::Kind;
use crate::object::{Object, ObjectName};
use crate::server::ApiServer;
use crate::target::{Cluster, check_name};
use crate::which::{Which, container_of, is_ready, runs};
use crate::workload::WorkloadName;

/// How many pods are looked into at once.
const AT_ONCE: usize = 8;

/// Configures `k8s.exec`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecConfig {
    /// The cluster. Default: the one that `kubectl` would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The namespace. Default: the target's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// The pod, which must run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The workload of which the first ready pod is taken: `deployment/web`, `statefulset/db`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<WorkloadName>,
    /// The labels of pods of which the first ready one is taken: `app=web,tier=api`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// The container. Default: the only one, or the one that the pod's annotation
    /// `kubectl.kubernetes.io/default-container` names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Variables added to its environment: texts, or references to secrets.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, TextOrSecret>,
    /// The working directory. Default: the container's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    /// The exit codes that mean success.
    #[serde(default = "zero")]
    pub success: BTreeSet<i64>,
    /// The program and its arguments that undo it, in a container of the same workload. Must cope with a
    /// command that did all, part or nothing, and with being run twice.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub undo: Vec<String>,
    /// States that the command changes nothing, so that there is nothing to undo.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_effect: bool,
    /// A command that exits with 0, in the container, once the work is done: then it is not run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unless: Vec<String>,
}

fn zero() -> BTreeSet<i64> {
    BTreeSet::from([0])
}

/// Runs a command inside a container of a pod: what cannot be undone, or [`UndoableExec`].
///
/// The command carries the step's marker in its environment, so that one that a crash left running
/// is found and ended before the step goes on.
#[derive(Debug, Clone)]
pub struct Exec {
    config: ExecConfig,
    cluster: Arc<Cluster>,
    namespace: String,
    which: Which,
}

/// Holds an [`Exec`] that can be undone: by another command, or because it changes nothing.
pub type UndoableExec = Undoable<Exec>;

/// Holds what undoing a command needs, whatever the pipeline says by then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecUndo {
    /// The namespace.
    pub namespace: String,
    /// The pod that was found.
    pub pod: String,
    /// What tells it from another of that name.
    pub pod_uid: String,
    /// The uid of what the pod belongs to; none where only labels say that pods are the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// The container.
    pub container: String,
    /// The command that undoes it; none if it cannot be undone, or has no effect.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub undo: Vec<String>,
}

/// Tells how the command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecOutput {
    /// The pod that it ran in; absent if it did not have to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The exit code; absent if the command did not have to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i64>,
    /// What it printed, trimmed, at most the last 64 KiB, secrets masked.
    pub stdout: String,
    /// The end of what it printed as errors, likewise.
    pub stderr: String,
}

impl ExecOutput {
    fn not_run() -> Self {
        Self { pod: None, exit_code: None, stdout: String::new(), stderr: String::new() }
    }
}

/// A container that was chosen.
struct Place {
    pod: Object,
    owner: Option<String>,
    container: String,
}

impl Exec {
    /// Makes the step from its configuration, without regard to whether it can be undone.
    ///
    /// # Errors
    /// There is no such target, or keys contradict each other.
    pub fn from_config(config: ExecConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let cluster = Cluster::named(config.target.as_deref(), cx)?;
        let namespace = config.namespace.clone().unwrap_or_else(|| cluster.namespace().to_owned());
        check_name(&namespace, "namespace")?;
        let which = Which::one_of(config.pod.as_deref(), config.workload.as_ref(), config.selector.as_deref())?;
        if config.command.is_empty() {
            return Err(BuildError::new("there is no command")
                .at("command")
                .with_hint("write `command: [program, argument]`"));
        }
        for (key, argv) in [("command", &config.command), ("undo", &config.undo), ("unless", &config.unless)] {
            if argv.first().is_some_and(String::is_empty) {
                return Err(BuildError::new("the program has no name").at(key));
            }
            if argv.iter().any(|word| word.contains('\0')) {
                return Err(BuildError::new("an argument cannot hold a NUL character").at(key));
            }
        }
        if config.no_effect && !config.undo.is_empty() {
            return Err(BuildError::new("a command without effect has nothing to undo")
                .at("no_effect")
                .with_hint("drop `no_effect`, or drop `undo`"));
        }
        if config.success.is_empty() {
            return Err(BuildError::new("no exit code means success").at("success").with_hint("drop `success` for 0"));
        }
        if let Some(name) = config.env.keys().find(|name| !is_variable(name)) {
            return Err(BuildError::new(format!("`{}` is not the name of a variable", name.escape_debug()))
                .at("env")
                .with_hint("letters, digits and `_`, no digit first: a shell in the container sets it"));
        }
        Ok(Self { config, cluster, namespace, which })
    }

    /// Makes the step from its configuration: reversible with `undo` or `no_effect`, irreversible
    /// without either.
    ///
    /// # Errors
    /// As [`Exec::from_config`].
    pub fn any_from_config(config: ExecConfig, cx: &BuildContext) -> Result<AnyStep, BuildError> {
        Self::from_config(config, cx).map(AnyStep::optionally_reversible)
    }

    async fn program(&self, cx: &Context, argv: &[String]) -> Result<Program, StepError> {
        let mut env = Vec::new();
        for (name, value) in &self.config.env {
            env.push((name.clone(), value.resolve(cx).await?.expose_secret().to_owned()));
        }
        Ok(Program { argv: argv.to_vec(), env, directory: self.config.directory.clone() })
    }

    /// Chooses a container: in the pod that was found before, if it is still there, or in the first ready one.
    async fn choose(&self, server: &ApiServer, before: Option<&ExecUndo>) -> Result<Place, StepError> {
        let Some(meant) = self.which.find(server, &self.namespace).await? else {
            return Err(self.which.missing(&self.namespace));
        };
        let found = meant.pods.len();
        // Whoever names a pod means it, ready or not.
        let by_name = matches!(self.which, Which::Pod(_));
        let mut fit: Vec<_> = meant.pods.into_iter().filter(|pod| is_ready(pod) || by_name).collect();
        fit.sort_by_key(|pod| before.is_none_or(|before| pod.uid() != before.pod_uid));
        let Some(pod) = fit.into_iter().next() else { return Err(self.which.none_ready(&self.namespace, found)) };
        let container = container_of(&pod, self.config.container.as_deref())?;
        if !runs(&pod, &container) {
            return Err(StepError::transient(format!("container {container} of pod {} does not run", pod.name()))
                .with_hint(format!(
                    "`kubectl describe pod {}` tells why; k8s.job needs no pod that runs",
                    pod.name()
                )));
        }
        Ok(Place { pod, owner: meant.owner, container })
    }

    /// Chooses a container of what was found.
    async fn choose_again(&self, server: &ApiServer, cx: &Context, undo: &ExecUndo) -> Result<Place, StepError> {
        let place = self.choose(server, Some(undo)).await?;
        let is_other = place.owner.is_some() && undo.owner.is_some() && place.owner != undo.owner;
        if !is_other || cx.on_conflict() == OnConflict::Overwrite {
            return Ok(place);
        }
        let uid = |uid: &Option<String>| uid.clone().unwrap_or_default();
        Err(StepError::conflict(Conflict {
            subject: format!("what {} belongs to", self.which),
            found: uid(&undo.owner),
            intended: uid(&undo.owner),
            present: uid(&place.owner),
        }))
    }

    fn inside<'a>(&'a self, server: &'a ApiServer, place: &'a Place) -> Inside<'a> {
        Inside { server, namespace: &self.namespace, pod: place.pod.name(), container: &place.container }
    }

    async fn already(&self, server: &ApiServer, cx: &Context, place: &Place) -> Result<bool, StepError> {
        if self.config.unless.is_empty() {
            return Ok(false);
        }
        let program = self.program(cx, &self.config.unless).await?;
        Ok(self.inside(server, place).run(&program).await?.code == 0)
    }

    /// Looks at what is there; nothing is run that changes anything.
    async fn look(&self, server: &ApiServer, cx: &Context) -> Result<(Place, bool), StepError> {
        let place = self.choose(server, None).await?;
        // What cannot be run, or could not be ended, is known before anything has happened.
        self.inside(server, &place).probe().await?;
        let already = self.already(server, cx, &place).await?;
        Ok((place, already))
    }
}

fn is_variable(name: &str) -> bool {
    let mut characters = name.chars();
    characters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && characters.all(|each| each.is_ascii_alphanumeric() || each == '_')
}

#[async_trait]
impl Step for Exec {
    const KIND: &'static str = "k8s.exec";
    type Undo = ExecUndo;
    type Output = ExecOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<ExecUndo, ExecOutput>, StepError> {
        let config = &self.config;
        let server = self.cluster.connect(cx).await?;
        let place = match self.look(&server, cx).await {
            Ok((_, true)) => return Ok(Prepared::unchanged(ExecOutput::not_run(), "`unless` says so")),
            Ok((place, false)) => Some(place),
            // An earlier step may start it.
            Err(_) if cx.is_dry_run() => None,
            Err(error) => return Err(error),
        };
        let change = Change::new(Effect::Run, format!("{}: {}", self.which, config.command.join(" ")));
        let change = match config.undo.is_empty() {
            false => change.with_summary(format!("undone by `{}`", config.undo.join(" "))),
            true if config.no_effect => change.with_summary("changes nothing"),
            true => change,
        };
        let undo = ExecUndo {
            namespace: self.namespace.clone(),
            pod: place.as_ref().map(|place| place.pod.name().to_owned()).unwrap_or_default(),
            pod_uid: place.as_ref().map(|place| place.pod.uid().to_owned()).unwrap_or_default(),
            owner: place.as_ref().and_then(|place| place.owner.clone()),
            container: place.map(|place| place.container).unwrap_or_default(),
            undo: config.undo.clone(),
        };
        Ok(Prepared::change(undo, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &ExecUndo) -> Result<ExecOutput, StepError> {
        let server = self.cluster.connect(cx).await?;
        let place = self.choose_again(&server, cx, undo).await?;
        // An earlier call may have finished without anybody seeing its end.
        if self.already(&server, cx, &place).await? {
            return Ok(ExecOutput::not_run());
        }
        let program = self.program(cx, &self.config.command).await?;
        let ended = self.inside(&server, &place).run(&program).await?;
        if !self.config.success.contains(&ended.code) {
            return Err(ended.failure(&self.config.command.join(" ")));
        }
        let pod = Some(place.pod.name().to_owned());
        let printed = ended.printed;
        Ok(ExecOutput { pod, exit_code: Some(ended.code), stdout: printed.stdout, stderr: printed.stderr })
    }

    /// Looks into every pod that a call may have chosen: the one that was found, and those that are there now.
    async fn settle(&self, cx: &Context, undo: &ExecUndo) -> Result<(), StepError> {
        let server = self.cluster.connect(cx).await?;
        let meant = self.which.find(&server, &undo.namespace).await?.unwrap_or_default();
        let mut pods = meant.pods;
        if !pods.iter().any(|pod| pod.uid() == undo.pod_uid) {
            let name = ObjectName::new(Kind::pod(), &undo.namespace, &undo.pod);
            pods.extend(server.get(&name).await?.filter(|pod| pod.uid() == undo.pod_uid));
        }
        // What ran in a container that has ended has ended with it.
        let running = pods.iter().filter(|pod| runs(pod, &undo.container));
        let looks = running.map(|pod| {
            let inside =
                Inside { server: &server, namespace: &undo.namespace, pod: pod.name(), container: &undo.container };
            async move { inside.end().await }
        });
        let looks: Vec<_> = looks.collect();
        stream::iter(looks).buffer_unordered(AT_ONCE).try_collect().await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.which.lock(&self.cluster, &self.namespace)]
    }
}

#[async_trait]
impl OptionalRollback for Exec {
    fn irreversible_because(&self) -> Option<&'static str> {
        (self.config.undo.is_empty() && !self.config.no_effect).then_some("no `undo` command is given")
    }

    async fn rollback(&self, cx: &Context, undo: &ExecUndo, _: Option<&ExecOutput>) -> Result<(), StepError> {
        if undo.undo.is_empty() {
            return Ok(());
        }
        let server = self.cluster.connect(cx).await?;
        let place = self.choose_again(&server, cx, undo).await?;
        let program = self.program(cx, &undo.undo).await?;
        let ended = self.inside(&server, &place).run(&program).await?;
        if ended.code == 0 { Ok(()) } else { Err(ended.failure(&undo.undo.join(" "))) }
    }
}
