//! `postgres.backup`: a database, or a part of it, kept in a directory that proves itself.

mod retention;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, OnConflict, blocking};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::step::{Change, Effect, Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::{Bytes, Span};

use crate::backup::dump::Dump;
use crate::backup::manifest::{Archive, Compression, Layout, Manifest, Prove, Scope, TableEntry};
use crate::backup::reload::{Ownership, Reload};
use crate::backup::tools::{Name, Tool, Tools};
use crate::backup::{contents, prove, storage, swap, template};
use crate::error::{Doing, PostgresError};
use crate::identifier::{Identifier, TableName};
use crate::program::end_leftovers;
use crate::session::Session;
use crate::target::Database;

/// Configures `postgres.backup`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BackupConfig {
    /// The database.
    pub target: String,
    /// A directory; each backup gets one of its own in it.
    pub to: PathBuf,
    /// Keeps these schemas only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schemas: Option<Vec<Identifier>>,
    /// Keeps these tables only, each with its partitions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tables: Option<Vec<TableName>>,
    /// How it is made.
    #[serde(default)]
    pub method: Method,
    /// How it is proven before it counts.
    #[serde(default)]
    pub prove: Prove,
    /// How many tables are dumped, compressed and restored at once. Default: as many as there are CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jobs: Option<usize>,
    /// The level of compression, from 1 to 19.
    #[serde(default = "default_level")]
    pub level: i32,
    /// How many backups of this step and database are kept after commit; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<usize>,
    /// How long backups of this step and database are kept. What `keep` or this keeps, stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_for: Option<Span>,
    /// What must stay free on the file system of the backup.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free: Option<Bytes>,
    /// What becomes of the backup when the run is rolled back.
    #[serde(default)]
    pub on_rollback: OnRollback,
    /// Which pg_dump and pg_restore are used, where they are not found by themselves.
    #[serde(default)]
    pub tools: Tools,
}

fn default_level() -> i32 {
    3
}

/// Says how a backup is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// By pg_dump, while the database is in use.
    #[default]
    Dump,
    /// By the server, as a copy beside the database, while nobody uses it.
    Template,
}

/// Says what becomes of a backup when the run that made it is rolled back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnRollback {
    /// It is removed: everything is as it was.
    #[default]
    Remove,
    /// It stays.
    Keep,
}

/// Keeps a database before an upgrade changes it.
///
/// # Guarantees
/// The backup appears under its name only when all of it is durable and proven. It is readable by
/// its owner alone, and holds the database as it was at one instant, however much was written
/// meanwhile.
///
/// Called again, or after a crash at any point, apply, rollback and commit converge.
#[derive(Debug, Clone)]
pub struct Backup {
    config: BackupConfig,
    scope: Scope,
    to: PathBuf,
    database: Arc<Database>,
}

/// Holds what undoing a backup needs: nothing was there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupUndo {
    /// The directory of the backup.
    pub path: PathBuf,
    /// The topmost directory that was not there; absent if all were.
    pub made: Option<PathBuf>,
    /// The copy on the server, if it is one.
    #[serde(default)]
    pub copy: Option<Identifier>,
}

/// Tells later steps where the backup is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupOutput {
    /// The directory of the backup.
    pub path: PathBuf,
    /// The SHA-256 digest of its manifest, which holds those of all its files.
    pub sha256: String,
    /// The database that it was taken from.
    pub database: String,
    /// The instant that it shows.
    pub taken: Timestamp,
    /// How many tables it holds.
    pub tables: u64,
    /// How many files it has.
    pub files: u64,
    /// How many bytes they have.
    pub bytes: u64,
    /// How it was proven.
    pub proven: Prove,
}

impl Backup {
    /// Makes the step from its configuration; a relative path starts from the context's directory.
    ///
    /// # Errors
    /// The target is not a database, or the configuration contradicts itself.
    pub fn from_config(config: BackupConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let database = cx.target::<Database>(&config.target)?;
        if !(1..=19).contains(&config.level) {
            return Err(BuildError::new("the level of compression is from 1 to 19").at("level"));
        }
        if config.jobs == Some(0) {
            return Err(BuildError::new("nothing is done by no jobs").at("jobs"));
        }
        let scope = match (&config.schemas, &config.tables) {
            (Some(_), Some(_)) => {
                return Err(BuildError::new("a backup is of schemas or of tables")
                    .at("tables")
                    .with_hint("make two steps of it, or name the tables' schemas"));
            }
            (Some(schemas), None) if schemas.is_empty() => {
                return Err(BuildError::new("there is nothing to keep").at("schemas"));
            }
            (None, Some(tables)) if tables.is_empty() => {
                return Err(BuildError::new("there is nothing to keep").at("tables"));
            }
            (Some(schemas), None) => Scope::Schemas(schemas.clone()),
            (None, Some(tables)) => Scope::Tables(tables.clone()),
            (None, None) => Scope::Whole,
        };
        if config.method == Method::Template {
            if scope != Scope::Whole {
                return Err(BuildError::new("a copy by the server is of the whole database").at("method"));
            }
            if config.prove == Prove::Restore {
                return Err(BuildError::new("a copy by the server is not restored to prove it")
                    .at("prove")
                    .with_hint("take `method: dump`, or leave `prove` out"));
            }
        }
        let to = cx.path(&config.to);
        Ok(Self { config, scope, to, database })
    }

    fn jobs(&self) -> usize {
        self.config.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, Into::into))
    }

    /// Names the backup of this run; the undo record keeps it from then on.
    fn path(&self, cx: &Context) -> PathBuf {
        let now = Timestamp::now().strftime("%Y%m%dT%H%M%SZ");
        let run = cx.run().to_string();
        let own = &run[run.len().saturating_sub(8)..];
        self.to.join(format!("{}-{now}-{own}", cx.subject()))
    }

    async fn tools(&self, cx: &Context, session: &Session) -> Result<(Tool, Tool), StepError> {
        let dump = self.config.tools.find(cx, Name::PgDump, session.facts().major()).await?;
        let restore = self.config.tools.find(cx, Name::PgRestore, dump.major).await?;
        Ok((dump, restore))
    }

    /// Sees that everything may be read, and says so before anything is done.
    async fn may(&self, session: &mut Session, tables: &[TableEntry]) -> Result<(), PostgresError> {
        let names: Vec<String> = tables.iter().map(|entry| entry.table.to_string()).collect();
        let hidden: Vec<String> = sqlx::query_scalar(
            "select name from unnest($1::text[]) name where not has_table_privilege(name, 'select') \
             or row_security_active(name)",
        )
        .bind(names)
        .fetch_all(session.connection())
        .await
        .doing(|| "looking what may be read".into())?;
        let user = session.facts().user.clone();
        if let Some(first) = hidden.first() {
            return Err(StepError::permanent(format!("{user} may not read all of {first}"))
                .with_detail(hidden.join("\n"))
                .with_hint("connect as the owner or a superuser, or grant pg_read_all_data; row-level policies ask for BYPASSRLS")
                .into());
        }
        if self.config.prove == Prove::Restore || self.config.method == Method::Template {
            may_create(session).await?;
        }
        Ok(())
    }

    async fn survey(&self, cx: &Context) -> Result<(BackupUndo, Change), StepError> {
        let mut session = self.database.connect(cx).await?;
        let path = self.path(cx);
        let change = Change::new(Effect::Create, path.display().to_string());
        let mut undo = BackupUndo { path, made: storage::topmost_missing(&self.to), copy: None };
        if self.config.method == Method::Template {
            may_create(&mut session).await?;
            undo.copy = Some(template::copy_name(cx));
            let others = template::others(&mut session).await?;
            session.close().await;
            if others > 0 && !cx.is_dry_run() {
                return Err(template::in_use(StepError::permanent(format!(
                    "{others} other sessions are connected, and the server copies only a database that nobody uses"
                ))));
            }
            return Ok((
                undo,
                change.with_summary("a copy of the database by the server, which nobody may use meanwhile"),
            ));
        }
        let (dump, _) = self.tools(cx, &session).await?;
        let tables = match contents::tables(session.connection(), &self.scope).await {
            // What is kept may be made by the steps that the plan has not run.
            Err(_) if cx.is_dry_run() && self.scope != Scope::Whole => {
                session.close().await;
                return Ok((undo, change.with_summary("what it holds is known when the steps before have run")));
            }
            other => other?,
        };
        self.may(&mut session, &tables).await?;
        let large: i64 = match self.scope {
            Scope::Whole => sqlx::query_scalar("select pg_table_size('pg_catalog.pg_largeobject')")
                .fetch_one(session.connection())
                .await
                .doing(|| "measuring the large objects".into())?,
            _ => 0,
        };
        session.close().await;
        let bytes = u64::try_from(tables.iter().map(|entry| entry.bytes).sum::<i64>() + large).unwrap_or(0);
        let times = if self.config.prove == Prove::Restore { 2 } else { 1 };
        let needed = (bytes * times).saturating_add(self.config.free.unwrap_or_default().0);
        let free = storage::free(&self.to)
            .map_err(|error| storage::failed(format!("{} cannot be looked at", self.to.display()), &error))?;
        if needed > free {
            return Err(storage::no_room("the backup", needed, &undo.path, free));
        }
        let how = match self.config.prove {
            Prove::List => "proven by its digests",
            Prove::Restore => "proven by a restore beside it",
        };
        let summary =
            format!("{} tables, {} on the server, by pg_dump {}, {how}", tables.len(), Bytes(bytes), dump.version);
        Ok((undo, change.with_summary(summary)))
    }

    async fn make(&self, cx: &Context, undo: &BackupUndo) -> Result<BackupOutput, StepError> {
        if undo.path.symlink_metadata().is_ok() {
            let manifest = self.expect_ours(cx, &undo.path).await?;
            return Ok(output(&undo.path, &manifest));
        }
        let temporary = storage::temporary(&undo.path, &cx.marker());
        let made = temporary.clone();
        blocking(move || {
            storage::create_directories(&storage::parent(&made))
                .and_then(|()| storage::fresh_directory(&made))
                .map_err(|error| storage::failed(format!("{} cannot be made", made.display()), &error))
        })
        .await?;
        let written = match self.config.method {
            Method::Dump => self.dump(cx, &temporary).await,
            Method::Template => self.copy(cx).await,
        };
        let place = undo.path.clone();
        let placed = match written {
            Ok(manifest) => {
                let temporary = temporary.clone();
                blocking(move || {
                    let placed = storage::make_durable(&temporary).and_then(|()| manifest.write(&temporary));
                    placed
                        .and_then(|manifest| std::fs::rename(&temporary, &place).map(|()| manifest))
                        .and_then(|manifest| storage::sync_directory(&storage::parent(&place)).map(|()| manifest))
                        .map_err(|error| storage::failed(format!("{} cannot be made", place.display()), &error))
                })
                .await
            }
            Err(error) => Err(error),
        };
        match placed {
            Ok(manifest) => Ok(output(&undo.path, &manifest)),
            Err(error) => {
                // What counts is why it failed; what stays is removed by settle or rollback.
                let _ = blocking(move || Ok(storage::remove(&temporary).is_ok())).await;
                Err(error)
            }
        }
    }

    async fn copy(&self, cx: &Context) -> Result<Manifest, StepError> {
        let mut session = self.database.connect(cx).await?;
        let source = contents::source(session.connection()).await?;
        let tables = contents::tables(session.connection(), &self.scope).await?;
        session.close().await;
        let mut session = self.database.connect_maintenance(cx).await?;
        let name = Identifier::new(source.database.clone())
            .map_err(|error| StepError::permanent("the database has no name that can be used").with_cause(&error))?;
        let like = swap::like(&mut session, &source.database).await?.ok_or_else(|| swap::gone(&name))?;
        template::copy(cx, &mut session, &name, &like).await?;
        session.close().await;
        let archive = Archive {
            layout: Layout::Template,
            compression: Compression::None,
            pg_dump: None,
            copy: Some(template::copy_name(cx)),
        };
        Ok(Manifest { tables, ..Manifest::new(cx, source, self.scope.clone(), archive) })
    }

    async fn dump(&self, cx: &Context, directory: &Path) -> Result<Manifest, StepError> {
        let mut session = self.database.connect(cx).await?;
        let (dump, restore) = self.tools(cx, &session).await?;
        let source = contents::source(session.connection()).await?;
        let like = swap::like(&mut session, &source.database).await?;
        let exact = self.config.prove == Prove::Restore;
        let before = if exact { contents::sequences(session.connection()).await? } else { Vec::new() };
        let begin = "begin isolation level repeatable read read only";
        sqlx::raw_sql(begin).execute(session.connection()).await.doing(|| "taking a snapshot".into())?;
        let snapshot: String = sqlx::query_scalar("select pg_export_snapshot()")
            .fetch_one(session.connection())
            .await
            .doing(|| "taking a snapshot".into())?;
        let taken = Timestamp::now();
        let mut tables = contents::tables(session.connection(), &self.scope).await?;
        let address = session.address().clone();
        let dumping = Dump { tool: &dump, scope: &self.scope, snapshot, jobs: self.jobs(), level: self.config.level };
        let dumping = async {
            cx.progress(0, None, format!("pg_dump {} writes {} tables", dump.version, tables.len()));
            dumping.write(cx, &address, directory).await
        };
        let names: Vec<_> = tables.iter().map(|entry| entry.table.clone()).collect();
        let canceller = session.canceller();
        let connection = session.connection();
        let whole = self.scope == Scope::Whole;
        let reading = async {
            if !exact {
                return Ok((Default::default(), None));
            }
            let read = canceller.cancels(cx, async {
                let read = contents::read(&mut *connection, &names).await?;
                let large = if whole { Some(contents::large_objects(connection).await?) } else { None };
                Ok((read, large))
            });
            Ok::<_, StepError>(read.await?)
        };
        // In the same snapshot, side by side.
        let ((archive, files), (mut read, large_objects)) = tokio::try_join!(dumping, reading)?;
        sqlx::raw_sql("commit").execute(session.connection()).await.doing(|| "letting the snapshot go".into())?;
        for entry in &mut tables {
            entry.fingerprint = read.remove(&entry.table);
        }
        let mut manifest = Manifest {
            taken,
            tables,
            files,
            large_objects,
            proven: self.config.prove,
            ..Manifest::new(cx, source, self.scope.clone(), archive)
        };
        if exact && whole {
            // A snapshot does not hold sequences still: those that moved meanwhile are not compared.
            let after = contents::sequences(session.connection()).await?;
            manifest.sequences = before.into_iter().filter(|entry| after.contains(entry)).collect();
        }
        let (context, backup, read_back) = (cx.clone(), directory.to_owned(), manifest.clone());
        blocking(move || Ok(read_back.verify(&backup, &context)?)).await?;
        let scratch = scratch(directory);
        prove::list(cx, &restore, &manifest, directory, &scratch).await?;
        if exact {
            let like = like.ok_or_else(|| StepError::unknown("the database is gone"))?;
            let reload = Reload { tool: &restore, jobs: self.jobs(), ownership: Ownership::Ours, scratch: &scratch };
            prove::restore(cx, &self.database, &mut session, &like, &reload, &manifest, directory).await?;
        }
        session.close().await;
        Ok(manifest)
    }

    /// Reads the backup's manifest and makes sure that this run made it.
    async fn expect_ours(&self, cx: &Context, path: &Path) -> Result<Manifest, StepError> {
        let (backup, marker) = (path.to_owned(), cx.marker());
        blocking(move || {
            let present = match Manifest::read(&backup) {
                Ok(manifest) if manifest.made_by == marker => {
                    let foreign = manifest
                        .foreign(&backup)
                        .map_err(|error| storage::failed(format!("{} cannot be read", backup.display()), &error))?;
                    match foreign {
                        None => return Ok(manifest),
                        Some(foreign) => format!("a backup with a file of somebody else's: {}", foreign.display()),
                    }
                }
                Ok(manifest) => format!("a backup made by {}", manifest.made_by),
                Err(error) => error.to_string(),
            };
            Err(StepError::conflict(Conflict {
                subject: backup.display().to_string(),
                found: "nothing".to_owned(),
                intended: format!("a backup made by {marker}"),
                present,
            }))
        })
        .await
    }

    /// Removes what a call that was cut off has left: files on the way, the scratch database.
    async fn clear(&self, cx: &Context, undo: &BackupUndo) -> Result<(), StepError> {
        if self.config.prove == Prove::Restore {
            let mut session = self.database.connect(cx).await?;
            swap::drop_database(&mut session, &prove::scratch_name(cx)).await?;
            session.close().await;
        }
        let temporary = storage::temporary(&undo.path, &cx.marker());
        blocking(move || {
            storage::remove(&scratch(&temporary))
                .and_then(|()| storage::remove(&temporary))
                .map_err(|error| storage::failed(format!("{} cannot be removed", temporary.display()), &error))
        })
        .await
    }

    async fn drop_copy(&self, cx: &Context, copy: Option<&Identifier>) -> Result<(), StepError> {
        let Some(copy) = copy else { return Ok(()) };
        let mut session = self.database.connect_maintenance(cx).await?;
        swap::drop_database(&mut session, copy).await?;
        session.close().await;
        Ok(())
    }

    async fn put_back(&self, cx: &Context, undo: &BackupUndo) -> Result<(), StepError> {
        self.clear(cx, undo).await?;
        if self.config.on_rollback == OnRollback::Keep {
            let (path, made) = (undo.path.clone(), undo.made.clone());
            if path.symlink_metadata().is_err() {
                self.drop_copy(cx, undo.copy.as_ref()).await?;
                remove_made(path, made).await?;
            }
            return Ok(());
        }
        if undo.path.symlink_metadata().is_ok() {
            if cx.on_conflict() != OnConflict::Overwrite {
                self.expect_ours(cx, &undo.path).await?;
            }
            let (path, marker) = (undo.path.clone(), cx.marker());
            blocking(move || {
                storage::remove_backup(&path, &marker)
                    .map_err(|error| storage::failed(format!("{} cannot be removed", path.display()), &error))
            })
            .await?;
        }
        self.drop_copy(cx, undo.copy.as_ref()).await?;
        remove_made(undo.path.clone(), undo.made.clone()).await
    }

    async fn prune(&self, cx: &Context, undo: &BackupUndo) -> Result<(), StepError> {
        self.clear(cx, undo).await?;
        if self.config.keep.is_none() && self.config.keep_for.is_none() {
            return Ok(());
        }
        let (to, own) = (self.to.clone(), undo.path.clone());
        let (keep, keep_for) = (self.config.keep, self.config.keep_for);
        let excess = blocking(move || retention::beyond(&to, &own, keep, keep_for, Timestamp::now())).await?;
        for (path, copy) in excess {
            self.drop_copy(cx, copy.as_ref()).await?;
            let marker = cx.marker();
            blocking(move || {
                storage::remove_backup(&path, &marker)
                    .map_err(|error| storage::failed(format!("{} cannot be removed", path.display()), &error))
            })
            .await?;
        }
        Ok(())
    }
}

async fn remove_made(path: PathBuf, made: Option<PathBuf>) -> Result<(), StepError> {
    blocking(move || {
        storage::remove_made(&storage::parent(&path), made.as_deref())
            .map_err(|error| storage::failed("a directory that was made for the backup cannot be removed", &error))
    })
    .await
}

/// Sees that the user may make databases.
pub(crate) async fn may_create(session: &mut Session) -> Result<(), StepError> {
    let may: bool = sqlx::query_scalar("select rolsuper or rolcreatedb from pg_roles where rolname = current_user")
        .fetch_one(session.connection())
        .await
        .doing(|| "looking whether databases may be made".into())?;
    if may {
        return Ok(());
    }
    let user =
        Identifier::new(session.facts().user.clone()).map_or_else(|_| "the user".into(), |name| name.to_string());
    Err(StepError::permanent(format!("{user} may not create databases"))
        .with_hint(format!("let a superuser run `alter role {user} createdb`, or connect as another user")))
}

/// Names the directory for what is decompressed of a backup: beside it, hidden.
fn scratch(backup: &Path) -> PathBuf {
    storage::temporary(backup, "plain")
}

fn output(path: &Path, manifest: &Manifest) -> BackupOutput {
    BackupOutput {
        path: path.to_owned(),
        sha256: manifest.sha256.clone(),
        database: manifest.source.database.clone(),
        taken: manifest.taken,
        tables: manifest.tables.len() as u64,
        files: manifest.files.len() as u64,
        bytes: manifest.bytes(),
        proven: manifest.proven,
    }
}

#[async_trait]
impl Step for Backup {
    const KIND: &'static str = "postgres.backup";
    type Undo = BackupUndo;
    type Output = BackupOutput;

    async fn prepare(&self, cx: &Context) -> Result<Prepared<BackupUndo, BackupOutput>, StepError> {
        let (undo, change) = self.survey(cx).await?;
        Ok(Prepared::change(undo, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &BackupUndo) -> Result<BackupOutput, StepError> {
        self.make(cx, undo).await
    }

    async fn settle(&self, cx: &Context, undo: &BackupUndo) -> Result<(), StepError> {
        end_leftovers(cx).await?;
        self.database.settle(cx).await?;
        self.clear(cx, undo).await
    }

    async fn commit(&self, cx: &Context, undo: &BackupUndo) -> Result<(), StepError> {
        self.prune(cx, undo).await
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }

    fn targets(&self) -> Vec<Arc<dyn Target>> {
        vec![self.database.clone()]
    }
}

#[async_trait]
impl Rollback for Backup {
    async fn rollback(&self, cx: &Context, undo: &BackupUndo, _output: Option<&BackupOutput>) -> Result<(), StepError> {
        self.put_back(cx, undo).await
    }
}
