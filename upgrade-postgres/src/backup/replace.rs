//! A backup put in the place of a database: filled beside it, verified, then exchanged.

use std::path::{Path, PathBuf};

use sqlx::AssertSqlSafe;
use upgrade_core::context::{Context, OnConflict, blocking};
use upgrade_core::error::StepError;

use super::manifest::{Layout, Manifest};
use super::reload::{Ownership, Reload};
use super::swap::{self, Like, Names};
use super::tools::{Name, Tools};
use super::{contents, storage};
use crate::error::Doing;
use crate::identifier::literal;
use crate::ledger::MADE_BY_US;
use crate::session::Session;
use crate::steps::BackupOutput;
use crate::target::Database;

/// Says how a backup is put in the place of a database.
#[derive(Debug, Clone)]
pub(crate) struct Replacement {
    /// The directory of the backup.
    pub(crate) backup: PathBuf,
    /// The digest that its manifest must have.
    pub(crate) sha256: Option<String>,
    /// How much is done at once.
    pub(crate) jobs: usize,
    /// Whether statistics are gathered before it is used.
    pub(crate) analyze: bool,
    /// Where files are decompressed; beside the backup if absent.
    pub(crate) scratch: Option<PathBuf>,
    pub(crate) tools: Tools,
}

/// Restores a backup in the place of the database that it was taken from, and drops what was there.
///
/// For steps that undo what they did by going back to a backup of the same run: it is called from
/// their `rollback`, and whatever was written since the backup is lost.
///
/// # Guarantees
/// The database is filled and verified under another name, and then takes its place in one
/// transaction: whoever looks finds the one or the other. Called again after a crash, it converges.
///
/// # Errors
/// The backup is not what it was, the server refuses it, or the databases cannot be exchanged.
pub async fn restore_into_place(
    cx: &Context,
    database: &Database,
    backup: &BackupOutput,
    tools: &Tools,
) -> Result<(), StepError> {
    let replacement = Replacement {
        backup: backup.path.clone(),
        sha256: Some(backup.sha256.clone()),
        jobs: parallelism(),
        analyze: true,
        scratch: None,
        tools: tools.clone(),
    };
    let mut session = database.connect_maintenance(cx).await?;
    let names = Names::of(cx, &database.address(cx).await?.database_name())?;
    let present = names.present(&mut session).await?;
    if present.kept.is_none() {
        let found = swap::like(&mut session, names.target.as_str()).await?.ok_or_else(|| swap::gone(&names.target))?;
        replacement.forward(cx, database, &found).await?;
    }
    for name in [&names.filling, &names.ready, &names.kept] {
        swap::drop_database(&mut session, name).await?;
    }
    session.close().await;
    replacement.clear(cx).await
}

/// Returns how much is done at once unless it is said.
pub(crate) fn parallelism() -> usize {
    std::thread::available_parallelism().map_or(1, Into::into)
}

impl Replacement {
    /// Reads the manifest and compares it, and every file if `whole`, with their digests.
    pub(crate) async fn manifest(&self, cx: &Context, whole: bool) -> Result<Manifest, StepError> {
        let (replacement, context) = (self.clone(), cx.clone());
        blocking(move || {
            let manifest = Manifest::read(&replacement.backup)?;
            if let Some(expected) = replacement.sha256.filter(|digest| !digest.eq_ignore_ascii_case(&manifest.sha256)) {
                return Err(StepError::permanent(format!(
                    "the manifest of {} has the SHA-256 digest {}, not {expected}",
                    replacement.backup.display(),
                    manifest.sha256
                ))
                .with_hint("it is another backup, or was changed: find the right one"));
            }
            if whole {
                manifest.verify(&replacement.backup, &context)?;
            }
            Ok(manifest)
        })
        .await
    }

    /// Names the directory for what is decompressed: the same in every call of a step.
    fn plain(&self, cx: &Context) -> PathBuf {
        let beside = storage::temporary(&self.backup, &cx.marker());
        match &self.scratch {
            Some(scratch) => scratch.join(beside.file_name().unwrap_or_default()),
            None => beside,
        }
    }

    /// Removes what a call that was cut off left on this machine.
    pub(crate) async fn clear(&self, cx: &Context) -> Result<(), StepError> {
        let plain = self.plain(cx);
        blocking(move || {
            storage::remove(&plain)
                .map_err(|error| storage::failed(format!("{} cannot be removed", plain.display()), &error))
        })
        .await
    }

    /// Fills, verifies and exchanges; from wherever an earlier call has left it.
    pub(crate) async fn forward(&self, cx: &Context, database: &Database, found: &Like) -> Result<(), StepError> {
        let mut session = database.connect_maintenance(cx).await?;
        let names = Names::of(cx, &database.address(cx).await?.database_name())?;
        let present = names.present(&mut session).await?;
        if let Some((kept, by)) = present.kept {
            return match kept == found.oid && by.is_some() && present.target == by {
                true => Ok(()),
                false => Err(names.conflict(found.oid, &present)),
            };
        }
        let overwrite = cx.on_conflict() == OnConflict::Overwrite && present.target.is_some();
        if present.target != Some(found.oid) && !overwrite {
            return Err(names.conflict(found.oid, &present));
        }
        if !present.ready {
            swap::drop_database(&mut session, &names.filling).await?;
            self.fill(cx, database, &mut session, &names, found).await?;
            names.mark_ready(cx, &mut session).await?;
        }
        let ready = swap::like(&mut session, names.ready.as_str()).await?.ok_or_else(|| swap::gone(&names.ready))?;
        cx.progress(0, None, "exchanging the databases");
        names.exchange(cx, &mut session, ready.oid).await?;
        session.close().await;
        Ok(())
    }

    async fn fill(
        &self,
        cx: &Context,
        database: &Database,
        session: &mut Session,
        names: &Names,
        found: &Like,
    ) -> Result<(), StepError> {
        let manifest = self.manifest(cx, true).await?;
        if let Some(copy) = &manifest.archive.copy {
            cx.progress(0, None, "copying the backup");
            swap::create_like(session, &names.filling, found, Some(copy)).await?;
        } else {
            let pg_dump = manifest.archive.pg_dump.as_deref().unwrap_or_default();
            let tool = self.tools.find(cx, Name::PgRestore, major_of(pg_dump)).await?;
            swap::create_like(session, &names.filling, found, None).await?;
            cx.progress(0, None, format!("pg_restore {} loads {} tables", tool.version, manifest.tables.len()));
            let plain = self.plain(cx);
            let reload = Reload { tool: &tool, jobs: self.jobs, ownership: Ownership::Kept, scratch: &plain };
            let address = session.address().clone();
            reload.load(cx, &address, &manifest, &self.backup, &names.filling).await?;
        }
        let mut filled = database.connect_to(cx, names.filling.as_str()).await?;
        cx.progress(0, None, "comparing what was restored with the backup's manifest");
        let canceller = filled.canceller();
        let connection = filled.connection();
        let differs = canceller.cancels(cx, contents::differences(connection, &manifest)).await?;
        if let Some(first) = differs.first() {
            return Err(StepError::permanent(format!(
                "what was restored is not what the backup's manifest says: {first}"
            ))
            .with_detail(differs.join("\n"))
            .with_hint("nothing was exchanged: look at the server's log, or take another backup"));
        }
        if manifest.run != cx.run().to_string() {
            // What another run had noted in the database it was taken from means nothing here.
            let schema = database.state_schema();
            let sql = format!(
                "do $do$ begin if obj_description(to_regnamespace({}), 'pg_namespace') = {} then \
                   drop schema {schema} cascade; end if; end $do$",
                literal(&schema.to_string()),
                literal(MADE_BY_US),
            );
            filled.execute(cx, sql).await.doing(|| "removing what another run had noted".into())?;
        }
        if self.analyze {
            cx.progress(0, None, "gathering statistics");
            filled.execute(cx, "analyze".into()).await.doing(|| "gathering statistics".into())?;
        }
        filled.close().await;
        Ok(())
    }

    /// Puts the kept database back; what was never exchanged is only dropped.
    pub(crate) async fn back(&self, cx: &Context, database: &Database, found: &Like) -> Result<(), StepError> {
        let mut session = database.connect_maintenance(cx).await?;
        let names = Names::of(cx, &database.address(cx).await?.database_name())?;
        let present = names.present(&mut session).await?;
        let overwrite = cx.on_conflict() == OnConflict::Overwrite;
        match present.kept {
            Some((kept, by)) => {
                let ours = kept == found.oid && by.is_some() && present.target == by;
                let old_one = overwrite && kept == found.oid;
                if !ours && !old_one {
                    return Err(names.conflict(found.oid, &present));
                }
                swap::drop_database(&mut session, &names.filling).await?;
                names.exchange_back(cx, &mut session, found, &present).await?;
            }
            None if present.target != Some(found.oid) && !overwrite => {
                return Err(names.conflict(found.oid, &present));
            }
            None => {}
        }
        swap::drop_database(&mut session, &names.filling).await?;
        swap::drop_database(&mut session, &names.ready).await?;
        session.close().await;
        self.clear(cx).await
    }

    /// Drops what only undo needed.
    pub(crate) async fn forget(&self, cx: &Context, database: &Database) -> Result<(), StepError> {
        let mut session = database.connect_maintenance(cx).await?;
        let names = Names::of(cx, &database.address(cx).await?.database_name())?;
        for name in [&names.filling, &names.ready, &names.kept] {
            swap::drop_database(&mut session, name).await?;
        }
        session.close().await;
        self.clear(cx).await
    }
}

/// Reads the number before the point of a version.
pub(crate) fn major_of(version: &str) -> i32 {
    version.split(|c: char| !c.is_ascii_digit()).next().and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Sees, before anything is made, that the backup can be restored here.
pub(crate) async fn fits(
    cx: &Context,
    session: &mut Session,
    manifest: &Manifest,
    backup: &Path,
    tools: &Tools,
) -> Result<(), StepError> {
    let here = contents::source(session.connection()).await?;
    if here.version / 10_000 < manifest.source.version / 10_000 {
        return Err(StepError::permanent(format!(
            "the backup was taken from PostgreSQL {}, and this server is {}",
            manifest.source.version / 10_000,
            here.version / 10_000
        ))
        .with_hint("restore it on a server that is at least as new"));
    }
    if here.encoding != manifest.source.encoding {
        return Err(StepError::permanent(format!(
            "the backup is in {}, and the database in {}",
            manifest.source.encoding, here.encoding
        ))
        .with_hint(format!("make the database anew with `encoding '{}'`", manifest.source.encoding)));
    }
    match &manifest.archive.copy {
        Some(copy) => {
            let there: bool = sqlx::query_scalar("select exists (select from pg_database where datname = $1)")
                .bind(copy.as_str())
                .fetch_one(session.connection())
                .await
                .doing(|| "looking for the copy".into())?;
            if !there || here.system != manifest.source.system {
                return Err(StepError::permanent(format!(
                    "the copy that {} speaks of is not on this server",
                    backup.display()
                ))
                .with_hint("restore it on the server where it was made, or take another backup"));
            }
        }
        None => {
            let pg_dump = manifest.archive.pg_dump.as_deref().unwrap_or_default();
            tools.find(cx, Name::PgRestore, major_of(pg_dump)).await?;
        }
    }
    debug_assert!(matches!(manifest.archive.layout, Layout::Template) == manifest.archive.copy.is_some());
    let held: Vec<String> = sqlx::query_scalar(AssertSqlSafe(
        "select 'subscription ' || subname from pg_subscription s join pg_database d on d.oid = subdbid \
           where datname = current_database() \
         union all select 'replication slot ' || slot_name from pg_replication_slots \
           where database = current_database() and not temporary \
         union all select 'prepared transaction ' || gid from pg_prepared_xacts where database = current_database()",
    ))
    .fetch_all(session.connection())
    .await
    .doing(|| "looking what holds on to the database".into())?;
    if let Some(first) = held.first()
        && !cx.is_dry_run()
    {
        return Err(StepError::permanent(format!("the database cannot be exchanged, as it has a {first}"))
            .with_detail(held.join("\n"))
            .with_hint("drop it, or end the prepared transaction, in an earlier step; make it anew afterwards"));
    }
    let may: bool = sqlx::query_scalar(
        "select pg_has_role(datdba, 'member') or (select rolsuper from pg_roles where rolname = current_user) \
         from pg_database where datname = current_database()",
    )
    .fetch_one(session.connection())
    .await
    .doing(|| "looking who owns the database".into())?;
    if !may {
        return Err(StepError::permanent(format!("{} does not own the database", session.facts().user))
            .with_hint("only its owner, with CREATEDB, or a superuser can exchange it: connect as one"));
    }
    crate::steps::may_create(session).await
}
