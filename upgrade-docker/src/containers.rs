//! What is done to one container, each so that a second call finds it done.

use std::path::Path;
use std::time::Duration;

use bollard::Docker;
use bollard::container::LogOutput;
use bollard::models::{ContainerInspectResponse, ContainerStateStatusEnum};
use bollard::query_parameters::{
    InspectContainerOptions, LogsOptionsBuilder, RemoveContainerOptionsBuilder, RenameContainerOptionsBuilder,
    StartContainerOptions, StopContainerOptionsBuilder,
};
use futures_util::StreamExt as _;
use tokio::time::{Instant, sleep};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use crate::error::{DockerError, Doing, found};

/// The grace of a container that states none: Docker's own default.
pub const STOP_GRACE: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);

/// Looks a container up, by name or id.
///
/// # Errors
/// The engine cannot be asked.
pub async fn inspect(client: &Docker, name: &str) -> Result<Option<ContainerInspectResponse>, DockerError> {
    let answer = client.inspect_container(name, None::<InspectContainerOptions>).await;
    found(answer.doing(|| format!("looking at container {name}")))
}

/// Returns the name of a container, without the engine's leading slash.
pub fn name_of(container: &ContainerInspectResponse) -> &str {
    container.name.as_deref().unwrap_or_default().trim_start_matches('/')
}

/// Returns the id of a container.
pub fn id_of(container: &ContainerInspectResponse) -> &str {
    container.id.as_deref().unwrap_or_default()
}

/// Tells whether a container runs, paused or not.
pub fn is_running(container: &ContainerInspectResponse) -> bool {
    container.state.as_ref().and_then(|state| state.running).unwrap_or(false)
}

/// Returns how long a container is given to end by itself.
pub fn grace_of(container: &ContainerInspectResponse) -> Duration {
    let stated = container.config.as_ref().and_then(|config| config.stop_timeout);
    stated.and_then(|seconds| u64::try_from(seconds).ok()).map_or(STOP_GRACE, Duration::from_secs)
}

/// Says in one line how a container is: `exited with 1 (out of memory)`, `running, healthy`.
pub fn state_line(container: &ContainerInspectResponse) -> String {
    let Some(state) = &container.state else { return "in no known state".into() };
    let status = state.status.unwrap_or(ContainerStateStatusEnum::EMPTY);
    match status {
        ContainerStateStatusEnum::EXITED | ContainerStateStatusEnum::DEAD => {
            let code = state.exit_code.unwrap_or(-1);
            let memory = if state.oom_killed == Some(true) { " (out of memory)" } else { "" };
            let said = state.error.as_deref().filter(|text| !text.is_empty()).map(|text| format!(": {text}"));
            format!("exited with {code}{memory}{}", said.unwrap_or_default())
        }
        other => match state.health.as_ref().and_then(|health| health.status) {
            Some(health) if health.as_ref() != "none" && !health.as_ref().is_empty() => format!("{other}, {health}"),
            _ => other.to_string(),
        },
    }
}

/// Starts a container. One that runs already is left alone.
///
/// # Errors
/// It cannot be started: its port is taken, its program does not exist, its network is gone.
pub async fn start(client: &Docker, id: &str, name: &str) -> Result<(), DockerError> {
    client.start_container(id, None::<StartContainerOptions>).await.doing(|| format!("starting container {name}"))
}

/// Stops a container and returns when it has ended: its stop signal, and a kill after the grace.
///
/// One that does not run, or does not exist, is left alone. The stop goes on at the engine when the
/// caller dies; whoever takes over calls this again and is then sure that nothing more comes.
///
/// # Errors
/// The engine cannot end it.
pub async fn stop(client: &Docker, id: &str, name: &str, grace: Duration) -> Result<(), DockerError> {
    let seconds = i32::try_from(grace.as_secs()).unwrap_or(i32::MAX);
    // The engine answers when it has ended, so the client must wait longer than the grace.
    let patient = client.clone().with_timeout(grace + client.timeout());
    let options = StopContainerOptionsBuilder::new().t(seconds).build();
    let stopped = patient.stop_container(id, Some(options)).await;
    found(stopped.doing(|| format!("stopping container {name}"))).map(|_| ())
}

/// Gives a container another name. One that has it already is left alone.
///
/// # Errors
/// Another container has that name.
pub async fn rename(client: &Docker, id: &str, to: &str) -> Result<(), DockerError> {
    let options = RenameContainerOptionsBuilder::new().name(to).build();
    let renamed = client.rename_container(id, options).await.doing(|| format!("giving a container the name {to}"));
    // Asked only then: while a service stands still, every request counts.
    match renamed {
        Err(_) if inspect(client, id).await?.is_some_and(|container| name_of(&container) == to) => Ok(()),
        renamed => renamed,
    }
}

/// Removes a container, with its anonymous volumes only if `volumes` says so, and returns when it is
/// gone. One that does not exist is left alone.
///
/// # Errors
/// The engine cannot remove it.
pub async fn remove(client: &Docker, id: &str, name: &str, volumes: bool) -> Result<(), DockerError> {
    let options = RemoveContainerOptionsBuilder::new().force(true).v(volumes).build();
    let mut attempt = 1;
    loop {
        let removed = client.remove_container(id, Some(options.clone())).await;
        match found(removed.doing(|| format!("removing container {name}"))) {
            // "removal of container … is already in progress": what an earlier call began.
            Err(error) if error.is_in_conflict() => break,
            // It was killed by that; an engine that was itself killed before learns of it late.
            Err(error) if error.missed_the_exit() && attempt < 3 => attempt += 1,
            Err(error) => return Err(error),
            Ok(_) => break,
        }
    }
    let until = Instant::now() + client.timeout();
    while inspect(client, id).await?.is_some() {
        if Instant::now() > until {
            return Err(StepError::transient(format!("container {name} is being removed and does not go"))
                .with_hint("look at the engine's log; `upgrade resume` when it is gone")
                .into());
        }
        sleep(POLL).await;
    }
    Ok(())
}

/// Lists what a container wrote to its own file system, which goes with it: paths, the first ones.
///
/// What shows there of its mounts is the engine's.
///
/// # Errors
/// The engine cannot be asked.
pub async fn written(client: &Docker, container: &ContainerInspectResponse) -> Result<Vec<String>, DockerError> {
    let changed = client.container_changes(id_of(container)).await;
    let changed = changed.doing(|| format!("asking what container {} wrote", name_of(container)))?;
    let mounts: Vec<_> = container.mounts.iter().flatten().filter_map(|mount| mount.destination.as_deref()).collect();
    let is_mount = |path: &str| mounts.iter().any(|mount| Path::new(mount).starts_with(path));
    let paths = changed.into_iter().flatten().map(|change| change.path);
    Ok(paths.filter(|path| !is_mount(path)).take(10).collect())
}

/// Returns the last lines that a container printed, its secrets masked; as many as there are to be had.
pub async fn last_lines(client: &Docker, cx: &Context, id: &str, lines: usize) -> Vec<String> {
    let options = LogsOptionsBuilder::new().stdout(true).stderr(true).tail(&lines.to_string()).build();
    let mut logs = client.logs(id, Some(options));
    let mut text = Vec::new();
    let reading = async {
        while let Some(Ok(output)) = logs.next().await {
            text.extend_from_slice(message(&output));
        }
    };
    // What a driver of logs elsewhere does not give back is not worth a wait.
    let _ = tokio::time::timeout(Duration::from_secs(5), reading).await;
    let text = cx.mask(&String::from_utf8_lossy(&text));
    let all: Vec<String> = text.lines().map(|line| line.chars().take(400).collect()).collect();
    all[all.len().saturating_sub(lines)..].to_vec()
}

/// Returns what a piece of a log says.
pub fn message(output: &LogOutput) -> &[u8] {
    match output {
        LogOutput::StdErr { message }
        | LogOutput::StdOut { message }
        | LogOutput::StdIn { message }
        | LogOutput::Console { message } => message,
    }
}
