//! Somebody else's tool: the revision found is recorded, and undo downgrades to exactly it.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use secrecy::ExposeSecret;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;

use super::Migrate;
use super::config::{MigrateConfig, Preset, RunnerConfig};
use crate::address::Address;
use crate::program::{Program, end_leftovers};
use crate::session::Session;
use crate::target::Database;

/// The revision where nothing was applied.
const NOTHING: &str = "";

/// Lets somebody else's tool apply migrations.
#[derive(Debug, Clone)]
pub struct Runner {
    config: MigrateConfig,
    runner: RunnerConfig,
    directory: PathBuf,
    database: Arc<Database>,
}

/// Holds the revision to go back to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunnerUndo {
    /// The revision found; empty where nothing was applied.
    revision: String,
}

/// Tells where the tool came from and went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunnerOutput {
    /// The revision found; empty where nothing was applied.
    pub from: String,
    /// The revision now.
    pub to: String,
}

impl Runner {
    /// Makes the step from its configuration.
    ///
    /// # Errors
    /// The target is not a database, a command is missing, or a key is for our own migrations.
    pub fn from_config(config: MigrateConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        let runner = config.runner.clone().unwrap_or_default();
        let runner = match runner.preset {
            Some(preset) => preset.fill(runner),
            None => runner,
        };
        for (key, argv) in [("current", &runner.current), ("up", &runner.up), ("down", &runner.down)] {
            if argv.first().is_none_or(String::is_empty) && (key != "down" || config.irreversible.is_none()) {
                return Err(BuildError::new(format!("there is no command `{key}`"))
                    .at(format!("runner.{key}"))
                    .with_hint("name a `preset`, or write `current`, `up` and `down` as [program, argument]"));
            }
        }
        if !runner.down.is_empty() && !runner.down.iter().any(|word| word.contains("{revision}")) {
            return Err(BuildError::new("the command does not say which revision it goes to")
                .at("runner.down")
                .with_hint("write `{revision}` where the tool takes it"));
        }
        let for_our_own = [
            ("layout", config.layout.is_some()),
            ("history_table", config.history_table.is_some()),
            ("adopt", config.adopt.is_some()),
            ("out_of_order", config.out_of_order),
            ("ignore_missing", config.ignore_missing),
            ("dry_run", config.dry_run),
            ("undo", config.undo.is_some()),
        ];
        if let Some((key, _)) = for_our_own.iter().find(|(_, given)| *given) {
            return Err(BuildError::new(format!("`{key}` says nothing to a `runner`")).at(*key).with_hint("drop it"));
        }
        if config.to.is_some() && !runner.up.iter().any(|word| word.contains("{to}")) {
            return Err(BuildError::new("the command does not take a version")
                .at("to")
                .with_hint("write `{to}` in `runner.up` where the tool takes it"));
        }
        let directory = cx.path(config.directory.clone().unwrap_or_default());
        Ok(Self { config, runner, directory, database })
    }

    /// Makes a command of the tool, led to the database by its environment.
    async fn program(&self, cx: &Context, address: &Address, argv: &[String]) -> Result<Program, StepError> {
        let mut program = Program::new(argv.iter().cloned()).within(&self.directory).on(cx, address)?;
        program = program.with_env("DATABASE_URL", url_of(address)?);
        for (name, value) in &self.runner.env {
            program = program.with_env(name.clone(), value.resolve(cx).await?.expose_secret().to_owned());
        }
        Ok(program)
    }

    fn argv(&self, argv: &[String], revision: &str) -> Vec<String> {
        let revision = match revision {
            NOTHING => self.runner.none.as_deref().unwrap_or_default(),
            revision => revision,
        };
        let to = match &self.config.to {
            Some(to) => to.as_str(),
            None => "head",
        };
        argv.iter().map(|word| word.replace("{revision}", revision).replace("{to}", to)).collect()
    }

    async fn run(&self, cx: &Context, argv: &[String], revision: &str) -> Result<String, StepError> {
        let session = self.session(cx).await?;
        let program = self.program(cx, session.address(), &self.argv(argv, revision)).await?;
        let ended = program.run(cx).await;
        session.close().await;
        let ended = ended?;
        match ended.code {
            Some(0) => Ok(ended.stdout),
            // Alembic says what it misses where others print their results.
            _ if ended.stderr.trim().is_empty() => {
                Err(program.failed(&ended).with_detail(cx.mask(ended.stdout.trim())))
            }
            _ => Err(program.failed(&ended)),
        }
    }

    /// Opens the session through which the tool reaches the database, and looks that it may write.
    async fn session(&self, cx: &Context) -> Result<Session, StepError> {
        let session = self.database.connect_aside(cx).await?;
        session.require_writable()?;
        Ok(session)
    }

    async fn revision(&self, cx: &Context) -> Result<String, StepError> {
        let printed = self.run(cx, &self.runner.current, NOTHING).await?;
        let mut revisions = printed.lines().filter_map(|line| line.split_whitespace().next());
        let revision = revisions.next().unwrap_or(NOTHING).to_owned();
        match revisions.next() {
            Some(_) => Err(StepError::permanent("the database is at several revisions at once")
                .with_detail(cx.mask(&printed))
                .with_hint("merge the branches of the migrations: a downgrade goes to one revision")),
            None => Ok(revision),
        }
    }
}

impl Preset {
    fn fill(self, mut runner: RunnerConfig) -> RunnerConfig {
        let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect();
        let Preset::Alembic = self;
        if runner.current.is_empty() {
            runner.current = words(&["alembic", "current"]);
        }
        if runner.up.is_empty() {
            runner.up = words(&["alembic", "upgrade", "{to}"]);
        }
        if runner.down.is_empty() {
            runner.down = words(&["alembic", "downgrade", "{revision}"]);
        }
        runner.none.get_or_insert_with(|| "base".to_owned());
        runner
    }
}

/// Writes the URL with its password, for the environment of a program.
fn url_of(address: &Address) -> Result<String, StepError> {
    let mut url = url::Url::parse(address.url())
        .map_err(|error| StepError::permanent("the URL of the database cannot be read").with_cause(&error))?;
    let password = address.password().map(|password| password.expose_secret().to_owned());
    // A URL without a host has no room for a password: PGPASSWORD holds it.
    let _ = url.set_password(password.as_deref());
    // libpq, and what is built on it, knows this spelling alone.
    let _ = url.set_scheme("postgresql");
    Ok(url.into())
}

/// Tells whether no earlier attempt can have left the database on the way, so that another state counts.
fn begins(cx: &Context) -> bool {
    cx.attempt() == 1 && !cx.is_interrupted() && cx.on_conflict() == OnConflict::Stop
}

fn conflict(found: &str, intended: &str, present: &str) -> StepError {
    StepError::conflict(Conflict {
        subject: "the revision of the database".into(),
        found: shown(found).into(),
        intended: shown(intended).into(),
        present: shown(present).into(),
    })
}

fn shown(revision: &str) -> &str {
    if revision == NOTHING { "nothing" } else { revision }
}

#[async_trait]
impl Step for Runner {
    const KIND: &'static str = Migrate::KIND;
    type Undo = RunnerUndo;
    type Output = RunnerOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<RunnerUndo, RunnerOutput>, StepError> {
        let argv = self.argv(&self.runner.up, NOTHING);
        let change = Change::new(Effect::Run, argv.join(" "));
        match self.revision(cx).await {
            Ok(revision) => {
                let change = change.with_summary(format!("from revision {}", shown(&revision)));
                Ok(Prepared::change(RunnerUndo { revision }, [change]))
            }
            // The program may come with a release that the plan has not put in place.
            Err(error) if cx.is_dry_run() => {
                let change = change.with_summary(format!("{error}; asked again before the step"));
                Ok(Prepared::change(RunnerUndo { revision: NOTHING.to_owned() }, [change]))
            }
            Err(error) => Err(error),
        }
    }

    async fn apply(&self, cx: &Context, undo: &RunnerUndo) -> Result<RunnerOutput, StepError> {
        let present = self.revision(cx).await?;
        if present != undo.revision && begins(cx) {
            return Err(conflict(
                &undo.revision,
                shown(self.argv(&["{to}".to_owned()], NOTHING)[0].as_str()),
                &present,
            ));
        }
        self.run(cx, &self.runner.up, NOTHING).await?;
        let to = self.revision(cx).await?;
        Ok(RunnerOutput { from: undo.revision.clone(), to })
    }

    async fn settle(&self, cx: &Context, _undo: &RunnerUndo) -> Result<(), StepError> {
        end_leftovers(cx).await?;
        self.database.settle(cx).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.database.clone()]
    }
}

#[async_trait]
impl Rollback for Runner {
    async fn rollback(&self, cx: &Context, undo: &RunnerUndo, output: Option<&RunnerOutput>) -> Result<(), StepError> {
        let present = self.revision(cx).await?;
        if present == undo.revision {
            return Ok(());
        }
        // Where apply did not finish, any revision on the way is its own partial work.
        if let Some(output) = output
            && present != output.to
            && begins(cx)
        {
            return Err(conflict(&undo.revision, &output.to, &present));
        }
        self.run(cx, &self.runner.down, &undo.revision).await?;
        let present = self.revision(cx).await?;
        if present == undo.revision {
            return Ok(());
        }
        Err(StepError::permanent(format!(
            "the tool downgraded to {} and not to {}",
            shown(&present),
            shown(&undo.revision)
        ))
        .with_hint("downgrade by hand, then resolve the step with --retry"))
    }
}
