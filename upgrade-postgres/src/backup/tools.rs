//! Which pg_dump and pg_restore are used, and whether they are new enough for the server.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use crate::program::Program;

/// Names the programs, where they are not found by themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tools {
    /// A path, or a command that ends in pg_dump: `[docker, exec, -e, PGPASSWORD, db, pg_dump]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pg_dump: Option<Command>,
    /// A path, or a command that ends in pg_restore and hands its standard input on:
    /// `[docker, exec, -i, -e, PGPASSWORD, db, pg_restore]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pg_restore: Option<Command>,
}

/// Names a program: by its path, or as a command of several words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Command {
    /// A path, or a name that is looked up in `PATH`.
    Path(String),
    /// A command and its first arguments.
    Argv(Vec<String>),
}

/// Names one of the two programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Name {
    /// Writes a backup.
    PgDump,
    /// Reads one.
    PgRestore,
}

impl Name {
    fn text(self) -> &'static str {
        match self {
            Self::PgDump => "pg_dump",
            Self::PgRestore => "pg_restore",
        }
    }
}

/// Holds a program that was found, and its version.
#[derive(Debug, Clone)]
pub(crate) struct Tool {
    argv: Vec<String>,
    /// As it spells it: `15.18`.
    pub(crate) version: String,
    /// The number before the point.
    pub(crate) major: i32,
    /// Whether it may run elsewhere, where neither our files nor our environment are.
    pub(crate) elsewhere: bool,
}

impl Tool {
    pub(crate) fn program(&self) -> Program {
        Program::new(self.argv.iter().cloned())
    }

    /// Tells whether this pg_dump can compress with zstd: some are built without.
    pub(crate) async fn has_zstd(&self, cx: &Context) -> Result<bool, StepError> {
        if self.major < 16 {
            return Ok(false);
        }
        // The options are read before anything else; the server need not be there.
        let probe = self.program().with([
            "--compress=zstd:3",
            "--format=custom",
            "--no-password",
            "--host=/nonexistent",
            "--dbname=none",
        ]);
        Ok(!probe.run(cx).await?.stderr.contains("compress"))
    }
}

impl Tools {
    /// Finds a program that is at least as new as `needed`.
    ///
    /// Looks in `PATH`, then where Debian and Red Hat install versions side by side. One of the very
    /// version is preferred.
    ///
    /// # Errors
    /// There is none, or it is older.
    pub(crate) async fn find(&self, cx: &Context, name: Name, needed: i32) -> Result<Tool, StepError> {
        let text = name.text();
        let configured = match name {
            Name::PgDump => &self.pg_dump,
            Name::PgRestore => &self.pg_restore,
        };
        let older = |tool: &Tool| {
            StepError::permanent(format!(
                "{} is version {}, older than what it has to work with: version {needed}",
                tool.argv.join(" "),
                tool.version
            ))
            .with_hint(format!(
                "install postgresql-client-{needed}, or name a newer one: `tools: {{ {text}: /usr/lib/postgresql/{needed}/bin/{text} }}`"
            ))
        };
        if let Some(command) = configured {
            let argv = match command {
                Command::Path(path) => vec![path.clone()],
                Command::Argv(argv) => argv.clone(),
            };
            let tool = asked(cx, argv, text).await?;
            return if tool.major < needed { Err(older(&tool)) } else { Ok(tool) };
        }
        let mut found = Vec::new();
        for path in candidates(text) {
            let Ok(tool) = asked(cx, vec![path.display().to_string()], text).await else { continue };
            // A newer one may speak to the server of what it does not know yet.
            if tool.major == needed {
                return Ok(tool);
            }
            found.push(tool);
        }
        if let Some(newer) = found.iter().find(|tool| tool.major > needed) {
            return Ok(newer.clone());
        }
        Err(match found.first() {
            Some(tool) => older(tool),
            None => StepError::permanent(format!("{text} is not installed: it is neither in PATH nor in /usr/lib/postgresql"))
                .with_hint(format!(
                    "install postgresql-client-{needed}, or say how it is run: `tools: {{ {text}: [docker, exec, -i, -e, PGPASSWORD, CONTAINER, {text}] }}`"
                )),
        })
    }
}

async fn asked(cx: &Context, argv: Vec<String>, name: &str) -> Result<Tool, StepError> {
    let ended = Program::new(argv.iter().cloned()).with(["--version"]).run(cx).await?;
    let version = version_of(&ended.stdout, name).filter(|_| ended.code == Some(0));
    let Some((version, major)) = version else {
        return Err(StepError::permanent(format!("`{} --version` does not answer as {name} does", argv.join(" ")))
            .with_detail(if ended.stderr.is_empty() { ended.stdout } else { ended.stderr })
            .with_hint(format!("let `tools` name {name} itself, or a command that runs it where the server is")));
    };
    let elsewhere = argv.len() > 1;
    Ok(Tool { argv, version, major, elsewhere })
}

/// Reads "pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)".
fn version_of(text: &str, name: &str) -> Option<(String, i32)> {
    let version =
        text.trim().strip_prefix(name)?.trim_start().strip_prefix("(PostgreSQL)")?.split_whitespace().next()?;
    let major = version.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
    Some((version.to_owned(), major))
}

fn candidates(name: &str) -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found: Vec<PathBuf> = std::env::split_paths(&path).map(|directory| directory.join(name)).collect();
    let mut versions = Vec::new();
    for (above, start) in [("/usr/lib/postgresql", ""), ("/usr", "pgsql-")] {
        let Ok(entries) = std::fs::read_dir(above) else { continue };
        for entry in entries.flatten() {
            let directory = entry.file_name();
            let version = directory.to_str().and_then(|text| text.strip_prefix(start)?.parse::<u32>().ok());
            if let Some(version) = version {
                versions.push((version, Path::new(above).join(&directory).join("bin").join(name)));
            }
        }
    }
    versions.sort_by(|one, other| other.cmp(one));
    found.extend(versions.into_iter().map(|(_, path)| path));
    found.retain(|path| path.is_file());
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_however_it_was_packaged() {
        let read = |text| version_of(text, "pg_dump").map(|(_, major)| major);
        assert_eq!(read("pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"), Some(15));
        assert_eq!(read("pg_dump (PostgreSQL) 19beta1"), Some(19));
        assert_eq!(read("pg_restore (PostgreSQL) 15.18"), None);
        assert_eq!(read("GNU coreutils 9.1"), None);
    }
}
