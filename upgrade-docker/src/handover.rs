//! An upgrade that replaces the container it runs in, handed over to a helper.
//!
//! ```text
//! driver in the old container        helper, from the same image
//! ---------------------------        ---------------------------
//! starts the helper                  waits for the run's lease
//! asks the engine to stop its own container
//! ends with it                       takes the lease, an epoch higher
//!                                    settles, goes on, or rolls back
//! ```
//!
//! The helper finds in the journal what the driver wrote there; there is no other way between the
//! two. So the directory of the journal must be a volume that both have, and a run on one that is
//! not is refused in the plan. A helper that dies is started again by the engine.

use std::collections::HashMap;
use std::path::Path;

use bollard::Docker;
use bollard::models::{
    ContainerCreateBody, ContainerInspectResponse, ContainerSummary, ContainerSummaryStateEnum, HostConfig,
    NetworkConnectRequest, RestartPolicy, RestartPolicyNameEnum,
};
use bollard::query_parameters::{CreateContainerOptionsBuilder, ListContainersOptionsBuilder};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::BuildError;

use crate::containers;
use crate::error::Doing;
use crate::naming::mark;

/// The label of a helper: the name of the container that is replaced.
pub const HELPER: &str = "io.github.upgrade-rs.helper-for";

/// Says how a run goes on when its own container stops.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Handover {
    /// The directory of the journal inside the container: on a volume, or it would end with it.
    pub state: String,
    /// The program and its arguments that take the run up, in the helper; `RUN` stands for its id:
    /// `[upgrade, --state-dir, /state, resume, --wait, 5m, RUN]`.
    pub command: Vec<String>,
}

impl Handover {
    /// Refuses what cannot work.
    ///
    /// # Errors
    /// The key that is wrong is named.
    pub fn validate(&self) -> Result<(), BuildError> {
        if !self.state.starts_with('/') {
            return Err(BuildError::new("the directory of the journal must be absolute").at("handover.state"));
        }
        if self.command.is_empty() {
            return Err(BuildError::new("there is no program").at("handover.command"));
        }
        if !self.command.iter().any(|argument| argument == "RUN") {
            return Err(BuildError::new("the command does not say which run it takes up")
                .at("handover.command")
                .with_hint("let one of its arguments be `RUN`"));
        }
        Ok(())
    }

    /// Asks whether a run inside of `container` can outlive it.
    ///
    /// # Errors
    /// The journal is in no volume: *permanent*.
    pub fn check(&self, container: &ContainerInspectResponse) -> Result<(), StepError> {
        let mounts = container.mounts.iter().flatten();
        let durable = |kind: &str| matches!(kind, "volume" | "bind");
        let kept = mounts.into_iter().any(|mount| {
            mount.typ.as_ref().is_some_and(|kind| durable(kind.as_ref()))
                && mount.destination.as_deref().is_some_and(|at| Path::new(&self.state).starts_with(at))
        });
        if kept {
            return Ok(());
        }
        let name = containers::name_of(container);
        Err(StepError::permanent(format!(
            "the journal at {} is inside container {name}, which this run replaces: it would end with it",
            self.state
        ))
        .with_hint(format!("mount a volume there: `docker run --volume {name}-state:{} …`", self.state)))
    }

    /// Starts the helper, unless it is there already; the caller may then be stopped at any time.
    ///
    /// # Errors
    /// The engine cannot make or start it.
    pub async fn prepare(
        &self,
        client: &Docker,
        cx: &Context,
        container: &ContainerInspectResponse,
    ) -> Result<(), StepError> {
        let (id, name) = (containers::id_of(container), containers::name_of(container));
        let helper = helper_name(name, cx);
        if containers::inspect(client, &helper).await?.is_none() {
            let command = self.command.iter().map(|part| match part.as_str() {
                "RUN" => cx.run().to_string(),
                other => other.to_owned(),
            });
            let config = container.config.clone().unwrap_or_default();
            let host = container.host_config.clone().unwrap_or_default();
            let body = ContainerCreateBody {
                image: container.image.clone(),
                // Not the marker: what settles an interrupted step would end its own driver.
                labels: Some(HashMap::from([(HELPER.to_owned(), name.to_owned())])),
                entrypoint: Some(Vec::new()),
                cmd: Some(command.collect()),
                env: config.env,
                user: config.user,
                working_dir: config.working_dir,
                host_config: Some(HostConfig {
                    volumes_from: Some(vec![id.to_owned()]),
                    network_mode: host.network_mode,
                    group_add: host.group_add,
                    extra_hosts: host.extra_hosts,
                    restart_policy: Some(RestartPolicy {
                        name: Some(RestartPolicyNameEnum::ON_FAILURE),
                        maximum_retry_count: Some(10),
                    }),
                    ..HostConfig::default()
                }),
                ..ContainerCreateBody::default()
            };
            let options = CreateContainerOptionsBuilder::new().name(&helper).build();
            let made = client.create_container(Some(options), body).await;
            made.doing(|| format!("making the helper {helper}"))?;
        }
        self.join(client, container, &helper).await?;
        containers::start(client, &helper, &helper).await?;
        Ok(())
    }

    /// Lets the helper reach all that the container reaches.
    async fn join(&self, client: &Docker, container: &ContainerInspectResponse, helper: &str) -> Result<(), StepError> {
        let networks = |container: &ContainerInspectResponse| -> Vec<String> {
            let settings = container.network_settings.as_ref().and_then(|settings| settings.networks.clone());
            settings.unwrap_or_default().into_keys().collect()
        };
        let Some(found) = containers::inspect(client, helper).await? else { return Ok(()) };
        let joined = networks(&found);
        for network in networks(container).into_iter().filter(|network| !joined.contains(network)) {
            let request = NetworkConnectRequest { container: helper.to_owned(), ..NetworkConnectRequest::default() };
            let done = client.connect_network(&network, request).await;
            done.doing(|| format!("letting the helper into network {network}"))?;
        }
        Ok(())
    }
}

fn helper_name(name: &str, cx: &Context) -> String {
    format!("{name}.helper-{}", mark(cx))
}

/// Removes the helpers of earlier runs that have ended.
///
/// # Errors
/// The engine cannot be asked.
pub async fn clear(client: &Docker, name: &str) -> Result<(), StepError> {
    // The states are looked at here: Podman refuses a list that is filtered by one that it does not know.
    let filters = HashMap::from([("label".to_owned(), vec![format!("{HELPER}={name}")])]);
    let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
    let found = client.list_containers(Some(options)).await.doing(|| "looking for helpers".into())?;
    let ended = |helper: &ContainerSummary| {
        use ContainerSummaryStateEnum as State;
        matches!(helper.state, Some(State::EXITED | State::CREATED | State::DEAD))
    };
    for id in found.into_iter().filter(ended).filter_map(|helper| helper.id) {
        containers::remove(client, &id, "of an earlier helper", false).await?;
    }
    Ok(())
}

/// Returns the id of the container that this process runs in, as far as the kernel tells.
///
/// The engine mounts `hostname` and other files of its own from a directory named for the
/// container; on cgroup v1 the path of the group ends in it as well.
pub fn own_container() -> Option<String> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    own_container_in(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"))
}

fn own_container_in(mounts: &str, groups: &str) -> Option<String> {
    let is_id = |text: &str| text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let mounted = mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        if at != "/etc/hostname" {
            return None;
        }
        Path::new(root).parent()?.file_name()?.to_str().filter(|name| is_id(name))
    });
    let grouped = || {
        groups.lines().find_map(|line| {
            let last = line.rsplit(['/', ':']).next()?;
            let last = last.strip_prefix("docker-").unwrap_or(last);
            let last = last.strip_suffix(".scope").unwrap_or(last);
            is_id(last).then_some(last)
        })
    };
    mounted.or_else(grouped).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_the_container_around_it() {
        let id = "4f1e".repeat(16);
        let mounts = format!(
            "700 690 0:61 / / rw - overlay overlay rw\n\
             705 700 254:1 /var/lib/docker/containers/{id}/resolv.conf /etc/resolv.conf rw - ext4 /dev/vda rw\n\
             706 700 254:1 /var/lib/docker/containers/{id}/hostname /etc/hostname rw - ext4 /dev/vda rw\n"
        );
        assert_eq!(own_container_in(&mounts, ""), Some(id.clone()));
        assert_eq!(own_container_in("", &format!("12:pids:/docker/{id}\n")), Some(id.clone()));
        assert_eq!(own_container_in("", &format!("0::/system.slice/docker-{id}.scope\n")), Some(id));
        assert_eq!(own_container_in("25 1 254:1 / / rw - ext4 /dev/vda rw\n", "0::/user.slice\n"), None);
    }

    #[test]
    fn a_handover_that_cannot_work_names_its_key() {
        let handover = |state: &str, command: &[&str]| Handover {
            state: state.into(),
            command: command.iter().map(|part| (*part).to_owned()).collect(),
        };
        for (wrong, key) in [
            (handover("state", &["upgrade", "resume", "RUN"]), "handover.state"),
            (handover("/state", &[]), "handover.command"),
            (handover("/state", &["upgrade", "resume"]), "handover.command"),
        ] {
            assert_eq!(wrong.validate().unwrap_err().key.as_deref(), Some(key));
        }
        handover("/state", &["upgrade", "resume", "RUN"]).validate().unwrap();
    }
}
