//! Runs a command with a real service of its own, which ends with it.
//!
//! ```text
//! testbed postgres [15|16|18] COMMAND [ARGUMENT…]
//! testbed docker COMMAND [ARGUMENT…]
//! testbed kubernetes [kubelet] COMMAND [ARGUMENT…]
//! ```
//!
//! The command finds the service's URL in `DATABASE_URL`; or the engine in `DOCKER_HOST`, the name of an
//! image of PostgreSQL on it in `POSTGRES_IMAGE`; or the cluster by `KUBECONFIG`, and its
//! `kubectl` first in `PATH`. Its exit status is that of
//! this program. The engine is the one that all tests share, and ends when nobody has used it for some seconds.

use std::process::{Command, ExitCode};

use upgrade_testbed::kubernetes::Cluster;
use upgrade_testbed::postgres::{self, Version};
use upgrade_testbed::{docker, kubernetes};

const USAGE: &str = "usage: testbed postgres [15|16|18] COMMAND [ARGUMENT…]\n       testbed docker COMMAND [ARGUMENT…]\n       \
                     testbed kubernetes [kubelet] COMMAND [ARGUMENT…]";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended = match words[..] {
        ["postgres", "15", program, ..] => with_postgres(Version::V15, program, &words[3..]),
        ["postgres", "16", program, ..] => with_postgres(Version::V16, program, &words[3..]),
        ["postgres", "18", program, ..] => with_postgres(Version::V18, program, &words[3..]),
        ["postgres", program, ..] => with_postgres(Version::V15, program, &words[2..]),
        ["docker", program, ..] => with_docker(program, &words[2..]),
        ["kubernetes", "kubelet", program, ..] => with_cluster(&kubernetes::kubelet(), program, &words[3..]),
        ["kubernetes", program, ..] => with_kubernetes(program, &words[2..]),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    ended.unwrap_or(ExitCode::from(1))
}

fn with_postgres(version: Version, program: &str, arguments: &[&str]) -> Option<ExitCode> {
    let server = postgres::own(version, &[])?;
    let database = server.database();
    Some(run(program, arguments, &[("DATABASE_URL", &database.url())]))
}

fn with_docker(program: &str, arguments: &[&str]) -> Option<ExitCode> {
    let engine = docker::shared()?;
    let image = engine.postgres()?;
    Some(run(program, arguments, &[("DOCKER_HOST", engine.host()), ("POSTGRES_IMAGE", &image)]))
}

fn with_kubernetes(program: &str, arguments: &[&str]) -> Option<ExitCode> {
    let own = kubernetes::own()?;
    with_cluster(own.cluster(), program, arguments)
}

fn with_cluster(cluster: &Cluster, program: &str, arguments: &[&str]) -> Option<ExitCode> {
    let kubeconfig = cluster.kubeconfig().to_string_lossy().into_owned();
    let others = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{others}", cluster.programs().display());
    Some(run(program, arguments, &[("KUBECONFIG", &kubeconfig), ("PATH", &path)]))
}

fn run(program: &str, arguments: &[&str], variables: &[(&str, &str)]) -> ExitCode {
    let status = Command::new(program).args(arguments).envs(variables.iter().copied()).status();
    match status {
        Ok(status) => ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)),
        Err(error) => {
            eprintln!("{program} cannot be started: {error}");
            ExitCode::from(1)
        }
    }
}
