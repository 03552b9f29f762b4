//! A way into the networks of an engine: to a database that only containers reach.
//!
//! Where this machine has a route to the container's address, as on the engine of a Linux machine,
//! connections are forwarded there. Elsewhere a program in a container of that network carries them,
//! one execution of it for each connection.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::PoisonError;
use std::time::Duration;

use async_trait::async_trait;
use bollard::Docker;
use bollard::exec::{CreateExecOptions, StartExecResults};
use bollard::models::ContainerInspectResponse;
use bollard::query_parameters::ListContainersOptionsBuilder;
use futures_util::StreamExt as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::BuildError;
use upgrade_core::tunnel::{Passage, Tunnel};

use crate::containers;
use crate::error::{DockerError, Doing, unless_cancelled};
use crate::health::address_of;
use crate::target::Engine;

/// What an address that leads somewhere answers within.
const REACHED: Duration = Duration::from_secs(5);
/// How long a program that cannot connect may take to say so, once for each place; one that takes
/// longer shows as a lost connection.
const TRIED: Duration = Duration::from_secs(1);
/// The label by which Compose names the service that a container belongs to.
const SERVICE: &str = "com.docker.compose.service";

/// Says through which container a network of the engine is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TunnelConfig {
    /// A running container on the network.
    pub container: String,
    /// The program in it that connects its input and output to a host and port, with `{host}` and
    /// `{port}` in their places. Default: `[nc, "{host}", "{port}"]`.
    #[serde(default = "netcat")]
    pub command: Vec<String>,
}

fn netcat() -> Vec<String> {
    ["nc", "{host}", "{port}"].map(str::to_owned).to_vec()
}

impl TunnelConfig {
    pub(crate) fn validate(&self) -> Result<(), BuildError> {
        let all = self.command.join(" ");
        if all.contains("{host}") && all.contains("{port}") {
            return Ok(());
        }
        Err(BuildError::new("the program is not told where to connect to")
            .at("tunnel.command")
            .with_hint("name `{host}` and `{port}` in it: [socat, -, \"TCP:{host}:{port}\"]"))
    }

    fn command_to(&self, host: &str, port: u16) -> Vec<String> {
        let port = port.to_string();
        self.command.iter().map(|word| word.replace("{host}", host).replace("{port}", &port)).collect()
    }
}

/// # Guarantees
/// Each connection is carried by itself and ends when either side does; all end with the passage.
///
/// # Caveats
/// An address is looked up when the passage is opened: a container that is started anew meanwhile
/// may have another one, and the next passage leads there.
#[async_trait]
impl Tunnel for Engine {
    async fn open(&self, cx: &Context, host: &str, port: u16) -> Result<Passage, StepError> {
        let client = self.connect(cx).await?;
        let way = match self.tunnel() {
            Some(tunnel) => {
                let place = (host.to_owned(), port);
                let known = self.led.lock().unwrap_or_else(PoisonError::into_inner).contains(&place);
                let way = through(&client, cx, tunnel, host, port, known).await?;
                self.led.lock().unwrap_or_else(PoisonError::into_inner).insert(place);
                way
            }
            None => reach(&client, cx, host, port).await?,
        };
        let listening = TcpListener::bind(("127.0.0.1", 0)).await;
        let (listener, address) =
            listening.and_then(|l| l.local_addr().map(|address| (l, address))).map_err(|error| {
                StepError::transient("no port of this machine can be listened on")
                    .with_cause(&error)
                    .with_hint("too many may be in use: `ss -tan | wc -l`")
            })?;
        let ended = CancellationToken::new();
        tokio::spawn(accept(listener, way, ended.clone()));
        Ok(Passage::new(address, ended.drop_guard()))
    }
}

/// How connections get to the other side.
#[derive(Clone)]
enum Way {
    Address(String, u16),
    Program { client: Docker, container: String, command: Vec<String> },
}

/// Finds the container that carries the connections, and tries whether it does.
async fn through(
    client: &Docker,
    cx: &Context,
    tunnel: &TunnelConfig,
    host: &str,
    port: u16,
    known: bool,
) -> Result<Way, StepError> {
    let name = &tunnel.container;
    let found = containers::inspect(client, name).await?;
    match found {
        Some(found) if containers::is_running(&found) => {}
        Some(found) => {
            let state = containers::state_line(&found);
            return Err(StepError::transient(format!("container {name}, the way to {host}:{port}, is {state}"))
                .with_hint("start it, or name another one of that network: `tunnel.container` of the target"));
        }
        None => {
            return Err(StepError::permanent(format!("there is no container {name}, the way to {host}:{port}"))
                .with_hint("name a running container of that network: `tunnel.container` of the target"));
        }
    }
    let way = Way::Program { client: client.clone(), container: name.clone(), command: tunnel.command_to(host, port) };
    // A program that is missing, or that refuses its arguments, ends at once: said now, it is not a
    // connection that the database is blamed for losing.
    if !known {
        unless_cancelled(cx, async { Ok(probe(&way).await?) }).await?;
    }
    Ok(way)
}

/// Runs the program once, to see whether it stays.
async fn probe(way: &Way) -> Result<(), DockerError> {
    let Way::Program { client, container, command } = way else { return Ok(()) };
    let (id, mut output, input) = execute(client, container, command).await?;
    let mut said = String::new();
    // That it prints something says nothing: some servers speak first, and an engine says there
    // that the program is missing.
    let until_end = async {
        while let Some(Ok(piece)) = output.next().await {
            if said.len() < 1000 {
                said.push_str(&String::from_utf8_lossy(containers::message(&piece)));
            }
        }
    };
    let stays = timeout(TRIED, until_end).await.is_err();
    drop(input);
    if stays {
        return Ok(());
    }
    let code = client.inspect_exec(&id).await.doing(|| "asking how the way into the network ended".into())?.exit_code;
    let Some(code) = code.filter(|code| *code != 0) else { return Ok(()) };
    let said = said.trim();
    Err(StepError::transient(format!(
        "`{}` in container {container} ended at once with {code}: {said}",
        command.join(" ")
    ))
    .with_hint("check that it is installed there and that host and port are right: `docker exec` tries it")
    .into())
}

/// Looks the address of a container up and tries whether it leads there.
async fn reach(client: &Docker, cx: &Context, host: &str, port: u16) -> Result<Way, StepError> {
    let address = match host.parse::<IpAddr>() {
        Ok(_) => host.to_owned(),
        Err(_) => address_of_name(client, host).await?,
    };
    let connecting = async {
        match timeout(REACHED, TcpStream::connect((address.as_str(), port))).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    };
    let reached: Result<(), io::Error> = unless_cancelled(cx, async { Ok(connecting.await) }).await?;
    reached.map_err(|error| {
        StepError::transient(format!("{host} is at {address} in a network of the engine, and port {port} is not reached"))
            .with_cause(&error)
            .with_hint(
                "check that it listens; if this machine has no route there, let a container carry it: `tunnel: { container: … }` of the target",
            )
    })?;
    Ok(Way::Address(address, port))
}

/// Finds the container that is called so: by its name, or as the only one of a Compose service.
async fn address_of_name(client: &Docker, host: &str) -> Result<String, StepError> {
    let container = match containers::inspect(client, host).await? {
        Some(container) => container,
        None => of_service(client, host).await?,
    };
    let name = containers::name_of(&container);
    if !containers::is_running(&container) {
        return Err(StepError::transient(format!("container {name} is {}", containers::state_line(&container)))
            .with_hint("start it; it has an address only while it runs"));
    }
    address_of(&container).ok_or_else(|| {
        StepError::permanent(format!("container {name} has no address in a network of the engine"))
            .with_hint("let a container of its network carry the connections: `tunnel: { container: … }` of the target")
    })
}

async fn of_service(client: &Docker, service: &str) -> Result<ContainerInspectResponse, StepError> {
    let filters = HashMap::from([("label".to_owned(), vec![format!("{SERVICE}={service}")])]);
    let options = ListContainersOptionsBuilder::new().filters(&filters).build();
    let listed = client.list_containers(Some(options)).await;
    let listed = listed.doing(|| format!("looking for container or service {service}"))?;
    let hint = "name the container itself: `docker ps` lists them";
    match &*listed {
        [one] => {
            let id = one.id.as_deref().unwrap_or_default();
            containers::inspect(client, id).await?.ok_or_else(|| {
                StepError::transient(format!("the container of service {service} has just gone")).with_hint(hint)
            })
        }
        [] => Err(StepError::permanent(format!("no running container or service is called {service}")).with_hint(hint)),
        several => {
            let count = several.len();
            Err(StepError::permanent(format!("{count} containers belong to a service {service}")).with_hint(hint))
        }
    }
}

async fn accept(listener: TcpListener, way: Way, ended: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = ended.cancelled() => return,
        };
        let Ok((mut near, _)) = accepted else {
            // Out of file descriptors, say: it may pass, and must not spin meanwhile.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let (way, ended) = (way.clone(), ended.clone());
        tokio::spawn(async move {
            let carried = async {
                match &way {
                    Way::Address(address, port) => {
                        let mut far = TcpStream::connect((address.as_str(), *port)).await?;
                        tokio::io::copy_bidirectional(&mut near, &mut far).await.map(drop)
                    }
                    Way::Program { client, container, command } => carry(near, client, container, command).await,
                }
            };
            let carried = tokio::select! {
                carried = carried => carried,
                () = ended.cancelled() => return,
            };
            if let Err(error) = carried {
                tracing::warn!(%error, "a connection into a network of the engine ended early");
            }
        });
    }
}

type Output = std::pin::Pin<
    Box<dyn futures_util::Stream<Item = Result<bollard::container::LogOutput, bollard::errors::Error>> + Send>,
>;
type Input = std::pin::Pin<Box<dyn tokio::io::AsyncWrite + Send>>;

async fn execute(client: &Docker, container: &str, command: &[String]) -> Result<(String, Output, Input), DockerError> {
    let doing = || format!("running `{}` in container {container}", command.join(" "));
    let options = CreateExecOptions {
        attach_stdin: Some(true),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        cmd: Some(command.to_vec()),
        ..CreateExecOptions::default()
    };
    let made = client.create_exec(container, options).await.doing(doing)?;
    match client.start_exec(&made.id, None).await.doing(doing)? {
        StartExecResults::Attached { output, input } => Ok((made.id, output, input)),
        StartExecResults::Detached => {
            Err(StepError::unknown(format!("{} has neither input nor output", doing())).into())
        }
    }
}

/// Carries one connection by a program: what comes from the near side is its input, what it prints
/// goes back.
async fn carry(near: TcpStream, client: &Docker, container: &str, command: &[String]) -> io::Result<()> {
    let (_, mut output, mut input) = execute(client, container, command).await.map_err(io::Error::other)?;
    let (mut from, mut to) = near.into_split();
    let onward = async move {
        let mut buffer = vec![0; 32 << 10];
        loop {
            let read = from.read(&mut buffer).await?;
            if read == 0 {
                // The program's input ends, and with it the connection; what still comes back is read.
                return input.shutdown().await;
            }
            input.write_all(&buffer[..read]).await?;
            input.flush().await?;
        }
    };
    let back = async move {
        while let Some(piece) = output.next().await {
            match piece.map_err(io::Error::other)? {
                bollard::container::LogOutput::StdErr { message } => {
                    tracing::warn!(said = %String::from_utf8_lossy(&message).trim(), "the way into the network");
                }
                piece => to.write_all(containers::message(&piece)).await?,
            }
        }
        to.shutdown().await
    };
    let mut onward = std::pin::pin!(onward);
    let mut back = std::pin::pin!(back);
    // The program's end is the connection's; that nothing more goes out is not.
    tokio::select! {
        done = &mut back => done,
        sent = &mut onward => { sent?; back.await }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_told_where_to_connect_to() {
        let with = |words: &[&str]| TunnelConfig {
            container: "jump".into(),
            command: words.iter().map(|word| (*word).to_owned()).collect(),
        };
        let socat = with(&["socat", "-", "TCP:{host}:{port}"]);
        socat.validate().unwrap();
        assert_eq!(socat.command_to("db", 5432), ["socat", "-", "TCP:db:5432"]);
        assert_eq!(with(&["nc", "{host}"]).validate().unwrap_err().key.as_deref(), Some("tunnel.command"));
    }
}
