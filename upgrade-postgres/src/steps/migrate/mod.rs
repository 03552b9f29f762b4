//! `postgres.migrate`: applies the migrations of a directory, and takes back exactly what it applied.
//!
//! ```text
//!   prepare   directory, history ──► pending; the down scripts go into the undo record
//!   apply     lock ─► read the history again ─► each: script + row of the history + note, one transaction
//!   rollback  lock ─► what the notes say, in reverse: down script − row − note, one transaction
//! ```

mod back;
mod config;
mod forward;
mod outside;
mod runner;
mod survey;
mod trial;
mod undo;
mod work;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;
use upgrade_core::AnyStep;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;

pub use config::{MigrateConfig, Preset, RunnerConfig, UndoBy};
pub use runner::{Runner, RunnerOutput, RunnerUndo};
pub(crate) use survey::Source;
pub use undo::{MigrateOutput, MigrateUndo};

use super::BackupOutput;
use crate::ledger::Ledger;
use crate::lint::{Finding, lint};
use crate::migrations::Script;
use crate::migrations::compare::error_of;
use crate::program::end_leftovers;
use crate::target::Database;
use survey::{Survey, Todo, others_of};
use undo::Course;

/// Applies the migrations of a directory.
///
/// # Guarantees
/// Each script runs once, in one transaction with its row in the history, whoever else applies
/// migrations at the same time. What is undone is what this run applied, by the down scripts that
/// were there when it was applied.
///
/// # Errors
/// Files and history contradict each other; a migration has no down script and the configuration
/// does not say how it is undone; a script fails, with file and line.
#[derive(Debug, Clone)]
pub struct Migrate {
    config: MigrateConfig,
    source: Source,
    database: Arc<Database>,
}

impl Migrate {
    /// Makes the step from its configuration, without regard to whether it is to be undone.
    ///
    /// # Errors
    /// The target is not a database, or keys contradict each other.
    pub fn from_config(config: MigrateConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        let Some(directory) = &config.directory else {
            return Err(BuildError::new("there is no directory")
                .at("directory")
                .with_hint("name the directory of the migrations, or a `runner` that knows its own"));
        };
        if config.runner.is_some() {
            return Err(BuildError::new("migrations that a `runner` applies are made as a `Runner`").at("runner"));
        }
        if let Some(undo) = &config.undo {
            check_undo(undo)?;
        }
        config.lint.validate().map_err(|error| BuildError { key: Some("lint".into()), ..error })?;
        let same = matches!(
            (config.adopt, config.layout),
            (Some(crate::migrations::Tool::Sqlx), Some(crate::migrations::Layout::Sqlx))
                | (Some(crate::migrations::Tool::Diesel), Some(crate::migrations::Layout::Diesel))
        );
        if same {
            return Err(BuildError::new("the history of that tool is used as it is: there is nothing to take over")
                .at("adopt")
                .with_hint("drop `adopt`"));
        }
        if config.irreversible.as_ref().is_some_and(|reason| reason.trim().is_empty()) {
            return Err(BuildError::new("there is no reason").at("irreversible"));
        }
        let source = Source::of(&config, &cx.path(directory));
        Ok(Self { config, source, database })
    }

    /// Makes the step from its configuration: of a directory or a `runner`, irreversible where it says so.
    ///
    /// # Errors
    /// As [`Migrate::from_config`] and [`Runner::from_config`].
    pub fn any_from_config(config: MigrateConfig, cx: &BuildContext) -> Result<AnyStep, BuildError> {
        let irreversible = config.irreversible.clone();
        if config.runner.is_some() {
            let runner = Runner::from_config(config, cx)?;
            return Ok(match irreversible {
                Some(reason) => AnyStep::irreversible(runner, reason),
                None => AnyStep::reversible(runner),
            });
        }
        let migrate = Self::from_config(config, cx)?;
        Ok(match irreversible {
            Some(reason) => AnyStep::irreversible(migrate, reason),
            None => AnyStep::reversible(migrate),
        })
    }

    /// Reads the scripts that would run, in order: what `postgres.lint` looks at.
    ///
    /// # Errors
    /// As `prepare`, what is missing for an undo excepted.
    pub async fn pending(&self, cx: &Context) -> Result<Vec<Script>, StepError> {
        let survey = self.survey(cx).await?;
        let (pending, _) = survey.compare(&self.source.terms)?;
        Ok(survey.todo(&pending)?.scripts)
    }

    async fn survey(&self, cx: &Context) -> Result<Survey, StepError> {
        let (directory, session) = tokio::join!(self.source.directory(), self.database.connect(cx));
        let (directory, mut session) = (directory?, session?);
        session.require_writable()?;
        let canceller = session.canceller();
        let survey = canceller.cancels(cx, self.source.survey(directory, session.connection())).await;
        session.close().await;
        Ok(survey?)
    }

    /// Refuses what could not be undone, and says what an undo would lose.
    fn undoable(&self, cx: &Context, todo: &Todo) -> Result<Option<BackupOutput>, StepError> {
        if self.config.irreversible.is_some() {
            return Ok(None);
        }
        let accepted = self.config.accepts_loss();
        if todo.course == Course::Down {
            let lost =
                todo.scripts.iter().find_map(|script| Some((&script.file, script.discards().into_iter().next()?)));
            if let Some((file, what)) = lost.filter(|_| accepted.is_none()) {
                return Err(StepError::permanent(format!("{file} discards {what}, which no rollback brings back"))
                    .with_hint(
                        "say why that may be: `undo: { accept_data_loss: REASON }`, or `irreversible: REASON`",
                    ));
            }
        }
        let without: Vec<_> = todo.items.iter().filter(|item| item.undo.is_none()).collect();
        let Some(first) = without.first() else { return Ok(None) };
        let Some(restore) = self.config.undo.as_ref().and_then(|undo| undo.restore.as_ref()) else {
            let more = if without.len() > 1 { format!(" and {} more", without.len() - 1) } else { String::new() };
            return Err(StepError::permanent(format!("{}{more}: there is no down script", first.file)).with_hint(
                "write one; or put a backup back: `undo: { restore: STEP }`; or say why not: `irreversible: REASON`",
            ));
        };
        if cx.is_dry_run() {
            return Ok(None);
        }
        if let Some(writes) = self.config.undo.as_ref().and_then(|undo| undo.writes.as_ref()) {
            // Its output is there only if this step needs it and it was applied: then it is in force.
            cx.output::<Value>(writes)?;
        }
        Ok(Some(cx.output::<BackupOutput>(restore)?))
    }

    fn changes(&self, survey: &Survey, todo: &Todo) -> Vec<Change> {
        let mut changes = Vec::new();
        if !survey.adopted.is_empty() {
            let summary = format!("takes over {} migrations that are applied", survey.adopted.len());
            changes.push(Change::new(Effect::Modify, survey.history.to_string()).with_summary(summary));
        }
        let written_since = self.config.undo.as_ref().and_then(|undo| match &undo.accept_data_loss {
            Some(reason) => Some(format!("all that is written after the backup ({reason})")),
            None => undo.restore.as_ref().map(|_| "nothing: writes are stopped".to_owned()),
        });
        for (item, script) in todo.items.iter().zip(&todo.scripts) {
            let how = if script.outside_transaction { "outside of a transaction" } else { "in a transaction" };
            let lost = match (todo.course, &item.undo) {
                (Course::Up, Some(down)) => Some(down.discards()).filter(|lost| !lost.is_empty()).map(|l| l.join(", ")),
                (Course::Up, None) => written_since.clone().filter(|lost| !lost.starts_with("nothing")),
                (Course::Down, _) => {
                    Some(script.discards()).filter(|lost| !lost.is_empty()).map(|lost| lost.join(", "))
                }
            };
            let mut change = Change::new(Effect::Run, item.file.clone()).with_summary(how);
            if let Some(lost) = lost {
                change = change.undo_loses(lost);
            }
            changes.push(change);
        }
        changes
    }
}

fn check_undo(undo: &UndoBy) -> Result<(), BuildError> {
    if undo.accept_data_loss.as_ref().is_some_and(|reason| reason.trim().is_empty()) {
        return Err(BuildError::new("there is no reason").at("undo.accept_data_loss"));
    }
    if undo.restore.is_some() && undo.writes.is_none() && undo.accept_data_loss.is_none() {
        return Err(BuildError::new("what is written after the backup would be lost").at("undo.restore").with_hint(
            "name the step that has stopped writes: `writes: STEP`; or say why not: `accept_data_loss: REASON`",
        ));
    }
    if undo.writes.is_some() && undo.restore.is_none() {
        return Err(BuildError::new("there is no `restore` that this could belong to").at("undo.writes"));
    }
    Ok(())
}

#[async_trait]
impl Step for Migrate {
    const KIND: &'static str = "postgres.migrate";
    type Undo = MigrateUndo;
    type Output = MigrateOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<MigrateUndo, MigrateOutput>, StepError> {
        if cx.is_dry_run() && !self.source.directory.exists() {
            return Ok(self.known_later());
        }
        let survey = self.survey(cx).await?;
        let (pending, drift) = survey.compare(&self.source.terms)?;
        if let Some(error) = error_of(&drift) {
            return Err(error);
        }
        let todo = survey.todo(&pending)?;
        let newest = survey.applied.keys().next_back().cloned();
        if todo.items.is_empty() && survey.adopted.is_empty() {
            let reason = match &newest {
                Some(newest) => format!("version {newest} is applied, and nothing is pending"),
                None => "there are no migrations".to_owned(),
            };
            let output = MigrateOutput { from: newest.clone(), to: newest, ..MigrateOutput::default() };
            return Ok(Prepared::unchanged(output, reason));
        }
        for script in todo.scripts.iter().chain(todo.items.iter().filter_map(|item| item.undo.as_ref())) {
            script.check()?;
            if script.outside_transaction {
                script.statements()?;
            }
        }
        let backup = self.undoable(cx, &todo)?;
        let mut changes = self.changes(&survey, &todo);
        if cx.is_dry_run() && todo.course == Course::Up {
            let skipped = changes.len() - todo.items.len();
            self.lint(cx, &todo.scripts, &mut changes[skipped..]).await?;
        }
        if self.config.dry_run {
            let skipped = changes.len() - todo.items.len();
            trial::run(cx, &self.database, &todo.scripts, &mut changes[skipped..]).await?;
        }
        let ours = |version: &_| {
            todo.items.iter().any(|item| item.version == *version)
                || survey.adopted.iter().any(|row| row.version == *version)
        };
        let (others, others_count) = others_of(&survey.applied, ours);
        let undo = MigrateUndo {
            history: survey.history.clone(),
            course: todo.course,
            others,
            others_count,
            migrations: todo.items,
            adopted: survey.adopted,
            backup,
        };
        Ok(Prepared::change(undo, changes))
    }

    async fn apply(&self, cx: &Context, undo: &MigrateUndo) -> Result<MigrateOutput, StepError> {
        forward::apply(cx, self, undo).await
    }

    async fn settle(&self, cx: &Context, undo: &MigrateUndo) -> Result<(), StepError> {
        if undo.backup.is_some() {
            end_leftovers(cx).await?;
        }
        self.database.settle(cx).await
    }

    async fn commit(&self, cx: &Context, _undo: &MigrateUndo) -> Result<(), StepError> {
        Ledger::forget(&self.database, cx).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.database.clone()]
    }
}

#[async_trait]
impl Rollback for Migrate {
    async fn rollback(
        &self,
        cx: &Context,
        undo: &MigrateUndo,
        _output: Option<&MigrateOutput>,
    ) -> Result<(), StepError> {
        back::rollback(cx, self, undo).await
    }
}

impl Migrate {
    /// Adds to each migration of a plan what the rules of `postgres.lint` find in it.
    async fn lint(&self, cx: &Context, scripts: &[Script], changes: &mut [Change]) -> Result<(), StepError> {
        let mut settings = self.config.lint.clone();
        if settings.version.is_none() {
            let session = self.database.connect(cx).await?;
            settings.version = Some(session.facts().major().to_string());
            session.close().await;
        }
        for (script, change) in scripts.iter().zip(changes) {
            let findings = lint(&[(PathBuf::from(&script.file), script.text.clone())], &settings);
            let open = findings.iter().filter(|finding| finding.allowed.is_none());
            let lines = open.map(|Finding { line, rule, severity, message, .. }| {
                format!("{severity} in line {line}, {rule}: {}", message.lines().next().unwrap_or_default())
            });
            change.summary =
                change.summary.take().into_iter().chain(lines).reduce(|all, next| format!("{all}; {next}"));
        }
        Ok(())
    }

    /// Answers a plan where an earlier step is still to bring the directory.
    fn known_later(&self) -> Prepared<MigrateUndo, MigrateOutput> {
        let directory: &PathBuf = &self.source.directory;
        let change = Change::new(Effect::Run, format!("the migrations in {}", directory.display()))
            .with_summary("the directory is not there now; it is read before the step");
        let history = crate::migrations::History {
            kind: crate::migrations::HistoryTable::Own,
            table: "unknown".parse().expect("a constant is a name"),
        };
        let undo = MigrateUndo {
            history,
            course: Course::Up,
            others: String::new(),
            others_count: 0,
            migrations: Vec::new(),
            adopted: Vec::new(),
            backup: None,
        };
        Prepared::change(undo, [change])
    }
}
