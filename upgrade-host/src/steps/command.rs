//! `host.command`: runs a program, and another one to undo it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::AnyStep;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::leftovers;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Step};
use upgrade_core::undoable::{OptionalRollback, Undoable};

use crate::files::absolute;
use crate::process::program::{Ended, Program, Role, line};
use upgrade_core::text_or_secret::TextOrSecret;

/// Configures `host.command`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CommandConfig {
    /// The program and its arguments; no shell reads them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub run: Vec<String>,
    /// Lets `/bin/sh` read `script`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub shell: bool,
    /// The script, with `shell: true`; it ends at the first command that fails (`sh -e`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub script: Option<String>,
    /// The program and its arguments that undo it. Must cope with a command that did all, part or
    /// nothing, and with being run twice.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub undo: Vec<String>,
    /// States that the command changes nothing, so that there is nothing to undo.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub no_effect: bool,
    /// Variables added to the environment: texts, or references to secrets.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, TextOrSecret>,
    /// The working directory; the directory of the pipeline file if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub directory: Option<PathBuf>,
    /// The exit codes that mean success.
    pub success: SuccessCodes,
    /// A path that is there once the command has been run: then it is not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub creates: Option<PathBuf>,
    /// A command that exits with 0 once this one has been run: then it is not run.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub unless: Vec<String>,
    /// A command that is run for the plan and before the step, and changes nothing: it must exit
    /// with 0, and what it prints is shown as the change.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub check: Vec<String>,
}

/// Lists the exit codes that mean success: 0 alone unless said otherwise.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SuccessCodes(pub Vec<i32>);

impl Default for SuccessCodes {
    fn default() -> Self {
        Self(vec![0])
    }
}

/// Runs a program: what cannot be undone, or [`Command::undone_by`] another program.
///
/// The program runs in a process group of its own with the step's marker in its environment, so
/// that cancelling ends all of it and a crash leaves nothing that cannot be found.
#[derive(Debug, Clone)]
pub struct Command {
    config: CommandConfig,
    directory: PathBuf,
}

/// Holds a [`Command`] that can be undone: by another command, or because it changes nothing.
pub type UndoableCommand = Undoable<Command>;

/// Holds nothing: what a command changes is known to its `undo` alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandUndo {}

/// Tells how the command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommandOutput {
    /// The exit code; absent if the command did not have to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// What it printed, trimmed, at most the last 64 KiB, secrets masked.
    pub stdout: String,
    /// The end of what it printed as errors, likewise.
    pub stderr: String,
}

impl CommandOutput {
    fn not_run() -> Self {
        Self { exit_code: None, stdout: String::new(), stderr: String::new() }
    }
}

impl Command {
    /// Runs a program with arguments, in the present working directory.
    pub fn new(argv: impl IntoIterator<Item = impl Into<String>>) -> Self {
        let config = CommandConfig { run: argv.into_iter().map(Into::into).collect(), ..CommandConfig::default() };
        Self { config, directory: absolute(".".as_ref()) }
    }

    /// Makes the step from its configuration, without regard to whether it can be undone.
    ///
    /// # Errors
    /// Not exactly one of `run` and `script` is given, or `script` without `shell: true`.
    pub fn from_config(config: CommandConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        argv_of(&config.run, config.shell, config.script.as_deref())?;
        for (key, argv) in [("undo", &config.undo), ("unless", &config.unless), ("check", &config.check)] {
            if argv.first().is_some_and(String::is_empty) {
                return Err(BuildError::new("the program has no name").at(key));
            }
        }
        if config.no_effect && !config.undo.is_empty() {
            return Err(BuildError::new("a command without effect has nothing to undo")
                .at("no_effect")
                .with_hint("drop `no_effect`, or drop `undo`"));
        }
        let directory = absolute(&cx.path(config.directory.clone().unwrap_or_default()));
        Ok(Self { config, directory })
    }

    /// Makes the step from its configuration: reversible with `undo` or `no_effect`, irreversible
    /// without either.
    ///
    /// # Errors
    /// As [`Command::from_config`].
    pub fn any_from_config(config: CommandConfig, cx: &BuildContext) -> Result<AnyStep, BuildError> {
        Self::from_config(config, cx).map(AnyStep::optionally_reversible)
    }

    /// Adds a variable to the environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<TextOrSecret>) -> Self {
        self.config.env.insert(name.into(), value.into());
        self
    }

    /// Runs the program in another working directory.
    #[must_use]
    pub fn directory(mut self, directory: impl Into<PathBuf>) -> Self {
        self.directory = absolute(&directory.into());
        self
    }

    /// Undoes the command by another one.
    pub fn undone_by(mut self, argv: impl IntoIterator<Item = impl Into<String>>) -> UndoableCommand {
        self.config.undo = argv.into_iter().map(Into::into).collect();
        Undoable::told(self)
    }

    /// States that the command changes nothing, so that there is nothing to undo.
    pub fn without_effect(mut self) -> UndoableCommand {
        self.config.no_effect = true;
        Undoable::told(self)
    }

    fn program(&self, argv: &[String]) -> Program {
        Program {
            argv: argv.to_vec(),
            env: self.config.env.clone(),
            directory: self.directory.clone(),
            role: Role::Step,
        }
    }

    fn argv(&self) -> Vec<String> {
        // `from_config` has refused what has no command; an empty one is refused when it is run.
        argv_of(&self.config.run, self.config.shell, self.config.script.as_deref()).unwrap_or_default()
    }

    /// Says why the command need not run, if that is so.
    async fn already(&self, cx: &Context) -> Result<Option<String>, StepError> {
        if let Some(path) = &self.config.creates {
            let path = self.directory.join(path);
            if tokio::fs::try_exists(&path).await.unwrap_or(false) {
                return Ok(Some(format!("{} is there", path.display())));
            }
        }
        if self.config.unless.is_empty() {
            return Ok(None);
        }
        match self.program(&self.config.unless).run(cx).await {
            Ok(ended) if ended.code == Some(0) => Ok(Some(format!("`{}` says so", line(&self.config.unless)))),
            Ok(Ended { code: Some(_), .. }) => Ok(None),
            Ok(ended) => Err(failure(&self.config.unless, &ended)),
            // What it asks may not be there before the steps that the plan has not run.
            Err(_) if cx.is_dry_run() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Runs `check` and returns what the plan shows.
    async fn foresee(&self, cx: &Context) -> Result<Change, StepError> {
        let change = Change::new(Effect::Run, line(&self.argv()));
        if self.config.check.is_empty() {
            return Ok(if self.config.no_effect { change.with_summary("changes nothing") } else { change });
        }
        match self.program(&self.config.check).run(cx).await {
            Ok(ended) if ended.code == Some(0) => {
                let shown = ended.stdout.trim();
                Ok(match shown.split_once('\n') {
                    _ if shown.is_empty() => change,
                    None => change.with_summary(shown),
                    Some((first, _)) => change.with_summary(first).with_diff(shown),
                })
            }
            Ok(ended) if cx.is_dry_run() => {
                let check = line(&self.config.check);
                Ok(change.with_summary(format!("`{check}` fails now ({}); asked again before the step", ended.how())))
            }
            Ok(ended) => Err(failure(&self.config.check, &ended)),
            Err(error) if cx.is_dry_run() => Ok(change.with_summary(format!("{error}; asked again before the step"))),
            Err(error) => Err(error),
        }
    }
}

/// Makes the argument vector of `run`, or of `script` with `shell: true`.
pub(crate) fn argv_of(run: &[String], shell: bool, script: Option<&str>) -> Result<Vec<String>, BuildError> {
    match (run, shell, script) {
        ([], true, Some(script)) => Ok(["/bin/sh", "-e", "-c", script].map(str::to_owned).to_vec()),
        ([program, ..], false, None) if !program.is_empty() => Ok(run.to_vec()),
        (_, false, Some(_)) => Err(BuildError::new("a script is read by a shell, which must be asked for")
            .at("script")
            .with_hint("add `shell: true`, or write the command as `run: [program, argument]`")),
        (_, true, None) => Err(BuildError::new("`shell: true` reads a `script`, and there is none").at("shell")),
        ([_, ..], true, Some(_)) => Err(BuildError::new("either `run` or `script`, not both").at("run")),
        _ => Err(BuildError::new("there is no command").at("run").with_hint("write `run: [program, argument]`")),
    }
}

/// Describes a command that did not end as it should: 75 (`EX_TEMPFAIL`) is worth another try,
/// and after a signal nobody knows what was done.
fn failure(argv: &[String], ended: &Ended) -> StepError {
    let message = format!("`{}` ended with {}", line(argv), ended.how());
    let error = match ended.code {
        Some(75) => StepError::transient(message),
        Some(_) => StepError::permanent(message),
        None => StepError::unknown(message),
    };
    error.with_detail(ended.detail()).with_hint("read what it said, mend that, and run it by hand to see it pass")
}

fn checked(success: &SuccessCodes, argv: &[String], ended: Ended) -> Result<CommandOutput, StepError> {
    if !ended.code.is_some_and(|code| success.0.contains(&code)) {
        return Err(failure(argv, &ended));
    }
    Ok(CommandOutput { exit_code: ended.code, stdout: ended.stdout.trim().to_owned(), stderr: ended.stderr })
}

#[async_trait]
impl Step for Command {
    const KIND: &'static str = "host.command";
    type Undo = CommandUndo;
    type Output = CommandOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<CommandUndo, CommandOutput>, StepError> {
        if let Some(reason) = self.already(cx).await? {
            return Ok(Prepared::unchanged(CommandOutput::not_run(), reason));
        }
        Ok(Prepared::change(CommandUndo {}, [self.foresee(cx).await?]))
    }

    async fn apply(&self, cx: &Context, _undo: &CommandUndo) -> Result<CommandOutput, StepError> {
        // An earlier call may have finished without anybody seeing its end.
        if self.already(cx).await?.is_some() {
            return Ok(CommandOutput::not_run());
        }
        let argv = self.argv();
        let ended = self.program(&argv).run(cx).await?;
        checked(&self.config.success, &argv, ended)
    }

    async fn settle(&self, cx: &Context, _undo: &CommandUndo) -> Result<(), StepError> {
        leftovers::end(cx).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}

#[async_trait]
impl OptionalRollback for Command {
    fn irreversible_because(&self) -> Option<&'static str> {
        (self.config.undo.is_empty() && !self.config.no_effect).then_some("no `undo` command is given")
    }

    async fn rollback(&self, cx: &Context, _: &CommandUndo, _: Option<&CommandOutput>) -> Result<(), StepError> {
        let config = &self.config;
        if config.no_effect {
            return Ok(());
        }
        let ended = self.program(&config.undo).run(cx).await?;
        checked(&SuccessCodes::default(), &config.undo, ended).map(drop)
    }
}
