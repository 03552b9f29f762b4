//! The program `docker compose` (version 2) or `docker-compose` (version 1), run to its end.
//!
//! It is led to the engine by its environment. What it leaves running after a crash is found by the
//! marker there, and ended before anybody works on the same project again.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;
use upgrade_core::context::Context;
use upgrade_core::error::{Class, StepError};
use upgrade_core::leftovers;

use crate::compose::model::{self, Model};
use crate::error::{advice, cancelled};
use crate::target::Engine;

/// Decide for Compose what the step decides, or are secrets that are none of its business.
const MISLEADING: [&str; 8] = [
    "COMPOSE_FILE",
    "COMPOSE_PATH_SEPARATOR",
    "COMPOSE_PROJECT_NAME",
    "COMPOSE_PROFILES",
    "COMPOSE_ENV_FILES",
    "DOCKER_CONTEXT",
    "DOCKER_TLS_VERIFY",
    "UPGRADE_SEAL_KEY",
];

/// How much of what Compose complains about is kept.
const COMPLAINTS: usize = 16 << 10;

/// Tells the two programs apart where they differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Generation {
    /// `docker-compose` 1.x, in Python.
    One,
    /// `docker compose` 2.x and later, in Go.
    Two,
}

/// Names a program, and the project that it is run on.
#[derive(Debug, Clone)]
pub(crate) struct Compose {
    pub(crate) argv: Vec<String>,
    pub(crate) generation: Generation,
    pub(crate) version: String,
    pub(crate) directory: PathBuf,
    /// Those that exist; none where Compose finds them by itself.
    pub(crate) files: Vec<PathBuf>,
    /// None where Compose finds it by itself.
    pub(crate) env_file: Option<PathBuf>,
    pub(crate) profiles: Vec<String>,
    environment: Vec<(String, String)>,
}

/// Tells how a run ended.
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Says how `up` treats one service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// Containers that differ from the files are made anew, and all are started.
    Recreate,
    /// Every container is made anew, and all are started: what Compose does not see as different lives
    /// in a container that is gone.
    Renew,
    /// Only what is missing is made; all are started.
    Missing,
    /// Containers that differ are made anew, and none is started.
    Stopped,
}

impl Compose {
    /// Finds the program: the one that is named, else version 2, else version 1.
    pub(crate) async fn find(
        cx: &Context,
        engine: &Engine,
        named: Option<&[String]>,
        directory: &Path,
    ) -> Result<Self, StepError> {
        let known: [&[&str]; 2] = [&["docker", "compose"], &["docker-compose"]];
        let candidates: Vec<Vec<String>> = match named {
            Some(argv) => vec![argv.to_vec()],
            None => known.iter().map(|argv| argv.iter().map(|word| (*word).to_owned()).collect()).collect(),
        };
        let mut said = Vec::new();
        for argv in candidates {
            let mut compose = Self {
                argv,
                generation: Generation::Two,
                version: String::new(),
                directory: directory.to_path_buf(),
                files: Vec::new(),
                env_file: None,
                profiles: Vec::new(),
                environment: surroundings(engine)?,
            };
            match compose.run(cx, &["version".into(), "--short".into()], Path::new("/")).await {
                Ok(ended) if ended.code == Some(0) => {
                    let version = ended.stdout.trim().trim_start_matches('v').to_owned();
                    compose.generation = if version.starts_with("1.") { Generation::One } else { Generation::Two };
                    compose.version = version;
                    return Ok(compose);
                }
                Ok(ended) => said.push(format!("`{}`: {}", compose.argv.join(" "), last_line(&ended.stderr))),
                Err(error) if cx.cancelled().is_cancelled() => return Err(error),
                Err(error) => said.push(error.causes().first().map_or_else(
                    || error.message().to_owned(),
                    |cause| format!("`{}`: {cause}", compose.argv.join(" ")),
                )),
            }
        }
        Err(StepError::permanent("Docker Compose is not here").with_detail(said.join("\n")).with_hint(
            "install the package docker-compose-plugin (`docker compose version`), or name the program in `compose`",
        ))
    }

    /// Reads what the files mean, with another environment file in place of the project's where one is given.
    pub(crate) async fn model(&self, cx: &Context, env_file: Option<&Path>) -> Result<Model, StepError> {
        let mut with = self.clone();
        if let Some(path) = env_file {
            with.env_file = Some(path.to_path_buf());
        }
        let text = with.succeed(cx, None, &["config".into()]).await?;
        model::read(&text, self.generation)
    }

    /// Returns the hash that each service's containers carry if they are as the files say; of the project
    /// that Compose finds by itself, where none is named.
    pub(crate) async fn hashes(
        &self,
        cx: &Context,
        project: Option<&str>,
    ) -> Result<BTreeMap<String, String>, StepError> {
        let text = self.succeed(cx, project, &["config".into(), "--hash".into(), "*".into()]).await?;
        let pair = |line: &str| {
            let (service, hash) = line.trim().split_once(' ')?;
            Some((service.to_owned(), hash.trim().to_owned()))
        };
        Ok(text.lines().filter_map(pair).collect())
    }

    /// Lets Compose bring services to what the files say, each to its number of containers, all at once.
    pub(crate) async fn up(
        &self,
        cx: &Context,
        project: &str,
        services: &[(&str, usize)],
        start: Start,
        grace: Option<Duration>,
    ) -> Result<(), StepError> {
        self.succeed(cx, Some(project), &self.up_arguments(services, start, grace)).await.map(drop)
    }

    fn up_arguments(&self, services: &[(&str, usize)], start: Start, grace: Option<Duration>) -> Vec<String> {
        let mut arguments: Vec<String> = ["up", "--no-build", "--no-deps"].map(str::to_owned).into();
        if self.generation == Generation::Two {
            // A service with `pull_policy: always` would move a tag that undo has just put back.
            arguments.extend(["--pull".into(), "never".into()]);
        }
        match start {
            Start::Recreate => arguments.push("--detach".into()),
            Start::Renew => arguments.extend(["--detach".into(), "--force-recreate".into()]),
            Start::Missing => arguments.extend(["--detach".into(), "--no-recreate".into()]),
            Start::Stopped => arguments.push("--no-start".into()),
        }
        if let Some(grace) = grace {
            arguments.extend(["--timeout".into(), grace.as_secs().to_string()]);
        }
        for (service, scale) in services {
            arguments.extend(["--scale".into(), format!("{service}={scale}")]);
        }
        arguments.extend(services.iter().map(|(service, _)| (*service).to_owned()));
        arguments
    }

    fn arguments(&self, project: Option<&str>, command: &[String]) -> Vec<String> {
        let mut all = Vec::new();
        for (option, value) in [("--project-name", project.map(str::to_owned))]
            .into_iter()
            .chain(self.files.iter().map(|file| ("--file", Some(file.display().to_string()))))
            .chain([("--env-file", self.env_file.as_ref().map(|file| file.display().to_string()))])
            .chain(self.profiles.iter().map(|profile| ("--profile", Some(profile.clone()))))
        {
            if let Some(value) = value {
                all.extend([option.to_owned(), value]);
            }
        }
        all.extend_from_slice(command);
        all
    }

    /// Writes the command as a person would type it.
    fn line(&self, arguments: &[String]) -> String {
        self.argv.iter().chain(arguments).map(String::as_str).collect::<Vec<_>>().join(" ")
    }

    async fn succeed(&self, cx: &Context, project: Option<&str>, command: &[String]) -> Result<String, StepError> {
        let arguments = self.arguments(project, command);
        let ended = self.run(cx, &arguments, &self.directory).await?;
        if ended.code == Some(0) {
            return Ok(ended.stdout);
        }
        let how = ended.code.map_or_else(|| "ended by a signal".to_owned(), |code| format!("exit code {code}"));
        let text = format!("`{}` failed ({how}): {}", self.line(&arguments), last_line(&ended.stderr));
        let (class, hint) = advice(0, &ended.stderr);
        let hint = hint.unwrap_or("run the command by hand in the project's directory: what it says is in the report");
        Err(StepError::new(class, text).with_detail(ended.stderr).with_hint(hint))
    }

    async fn run(&self, cx: &Context, arguments: &[String], directory: &Path) -> Result<Ended, StepError> {
        if cx.cancelled().is_cancelled() {
            return Err(cancelled());
        }
        let [program, first @ ..] = self.argv.as_slice() else {
            return Err(StepError::permanent("the command is empty").with_hint("write `compose: [docker, compose]`"));
        };
        let mut command = Command::new(program);
        command.args(first).args(arguments).current_dir(directory).process_group(0).kill_on_drop(true);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for name in MISLEADING {
            command.env_remove(name);
        }
        for (name, value) in &self.environment {
            command.env(name, value);
        }
        command.env(Context::MARKER, cx.marker());
        let mut child = command.spawn().map_err(|error| {
            let (class, hint) = match error.kind() {
                std::io::ErrorKind::NotFound => {
                    (Class::Permanent, "install Docker Compose, or name its program in `compose`")
                }
                std::io::ErrorKind::PermissionDenied => {
                    (Class::Permanent, "let the user run it, or name another program in `compose`")
                }
                _ => (Class::Transient, "the machine may be short of processes or memory"),
            };
            StepError::new(class, format!("`{}` cannot be started", self.argv.join(" ")))
                .with_cause(&error)
                .with_hint(hint)
        })?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let read = async { tokio::join!(all_of(stdout), all_of(stderr), child.wait()) };
        let (stdout, stderr, status) = tokio::select! {
            biased;
            read = read => read,
            () = cx.cancelled().cancelled() => {
                leftovers::end(cx).await?;
                return Err(cancelled());
            }
        };
        let status =
            status.map_err(|error| StepError::unknown("the end of Docker Compose was not seen").with_cause(&error))?;
        let complaint = cx.mask(&String::from_utf8_lossy(&stderr));
        let from = complaint.len().saturating_sub(COMPLAINTS);
        let from = (from..=complaint.len()).find(|at| complaint.is_char_boundary(*at)).unwrap_or(0);
        Ok(Ended {
            code: status.code(),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr: complaint[from..].trim_end().to_owned(),
        })
    }
}

async fn all_of(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut all = Vec::new();
    if let Some(mut stream) = stream {
        // What broke off is judged by the exit code.
        let _ = stream.read_to_end(&mut all).await;
    }
    all
}

/// The line that tells why: the last one.
fn last_line(text: &str) -> &str {
    text.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it said nothing")
}

/// Leads Compose to the engine.
fn surroundings(engine: &Engine) -> Result<Vec<(String, String)>, StepError> {
    let mut all = vec![("DOCKER_HOST".to_owned(), engine.host().to_owned())];
    // Version 1 gives up on a stop that takes longer than a minute.
    if std::env::var_os("COMPOSE_HTTP_TIMEOUT").is_none() {
        all.push(("COMPOSE_HTTP_TIMEOUT".into(), "600".into()));
    }
    if let Some(tls) = engine.tls() {
        let directory = tls.ca.parent().unwrap_or(Path::new("."));
        let standard = [(&tls.ca, "ca.pem"), (&tls.cert, "cert.pem"), (&tls.key, "key.pem")]
            .into_iter()
            .all(|(file, name)| *file == directory.join(name));
        if !standard {
            return Err(StepError::permanent("Compose finds the files for TLS only under their usual names")
                .with_hint("put them in one directory as ca.pem, cert.pem and key.pem, and name those under `tls` of the target"));
        }
        all.push(("DOCKER_TLS_VERIFY".into(), "1".into()));
        all.push(("DOCKER_CERT_PATH".into(), directory.display().to_string()));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn compose(generation: Generation) -> Compose {
        Compose {
            argv: vec!["docker".into(), "compose".into()],
            generation,
            version: "2.30.0".into(),
            directory: "/srv/shop".into(),
            files: vec!["a.yaml".into(), "b.yaml".into()],
            env_file: None,
            profiles: vec!["jobs".into()],
            environment: Vec::new(),
        }
    }

    #[test]
    fn both_versions_are_told_the_same_as_far_as_they_can_be() {
        let two = compose(Generation::Two);
        let up = two.up_arguments(&[("web", 2)], Start::Recreate, Some(Duration::from_secs(7)));
        assert_eq!(
            two.line(&two.arguments(Some("shop"), &up)),
            "docker compose --project-name shop --file a.yaml --file b.yaml --profile jobs up --no-build --no-deps \
             --pull never --detach --timeout 7 --scale web=2 web"
        );
        let one = compose(Generation::One);
        assert_eq!(
            one.up_arguments(&[("db", 1), ("web", 3)], Start::Stopped, None).join(" "),
            "up --no-build --no-deps --no-start --scale db=1 --scale web=3 db web"
        );
    }

    #[test]
    fn the_reason_is_the_last_thing_that_is_said() {
        assert_eq!(last_line("Recreating web ... error\n\nERROR: port is taken\n\n"), "ERROR: port is taken");
        assert_eq!(last_line(" \n"), "it said nothing");
    }
}
