//! The files of a directory of migrations, as the tools that people use name them.
//!
//! | layout | up | down |
//! |---|---|---|
//! | sqlx | `V_name.up.sql`, or `V_name.sql` | `V_name.down.sql` |
//! | diesel | `V_name/up.sql` | `V_name/down.sql` |
//! | golang-migrate | `V_name.up.sql` | `V_name.down.sql` |
//! | Flyway | `V1.2__name.sql` | `U1.2__name.sql` |

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use upgrade_core::error::StepError;

use super::script::Script;
use super::version::MigrationVersion;

/// Names whose way of naming files a directory follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Layout {
    /// sqlx: `V_name.up.sql` and `V_name.down.sql`, or `V_name.sql` alone.
    Sqlx,
    /// diesel: `V_name/up.sql` and `V_name/down.sql`.
    Diesel,
    /// golang-migrate: `V_name.up.sql` and `V_name.down.sql`.
    GolangMigrate,
    /// Flyway: `V1__name.sql` and `U1__name.sql`.
    Flyway,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layout::Sqlx => "sqlx",
            Layout::Diesel => "diesel",
            Layout::GolangMigrate => "golang-migrate",
            Layout::Flyway => "flyway",
        })
    }
}

/// Holds one migration; its down script is read when it is needed.
#[derive(Debug, Clone)]
pub struct Migration {
    /// Its version.
    pub version: MigrationVersion,
    /// Its name, spaces for underscores, as the tools write it into their histories.
    pub description: String,
    /// What it does.
    pub up: Script,
    /// Where its undo stands.
    down: Option<PathBuf>,
    /// Whether a file beside it says that it runs outside of a transaction.
    outside: bool,
}

impl Migration {
    /// Tells whether there is an undo.
    pub fn has_down(&self) -> bool {
        self.down.is_some()
    }

    /// Reads the undo; `None` if there is none.
    ///
    /// # Errors
    /// The file cannot be read, or is not UTF-8.
    pub fn down(&self) -> Result<Option<Script>, StepError> {
        let Some(path) = &self.down else { return Ok(None) };
        let mut script = read(path)?;
        script.outside_transaction |= self.outside;
        Ok(Some(script))
    }
}

/// Holds the migrations of a directory, oldest first.
#[derive(Debug, Clone)]
pub struct Directory {
    /// How its files are named.
    pub layout: Layout,
    /// The migrations, sorted by version.
    pub migrations: Vec<Migration>,
}

/// Says which file of which migration a name is.
#[derive(Clone)]
struct Named {
    version: MigrationVersion,
    name: String,
    down: bool,
    path: PathBuf,
}

#[derive(Default)]
struct Pair {
    name: String,
    up: Option<PathBuf>,
    down: Option<PathBuf>,
}

impl Directory {
    /// Reads a directory; without a layout it is told from the names.
    ///
    /// # Errors
    /// It cannot be read; its names fit no layout or two; a version is there twice, or has only a
    /// down script; a script is not UTF-8.
    pub fn read(path: &Path, layout: Option<Layout>) -> Result<Self, StepError> {
        let (files, folders) = entries(path)?;
        let layout = match layout {
            Some(layout) => layout,
            None => detect(path, &files, &folders)?,
        };
        let named = match layout {
            Layout::Diesel => folders.iter().map(|path| diesel(path)).collect::<Result<Vec<_>, _>>()?.concat(),
            _ => files.iter().filter_map(|path| file(layout, path).transpose()).collect::<Result<_, _>>()?,
        };
        let mut pairs: BTreeMap<MigrationVersion, Pair> = BTreeMap::new();
        for Named { version, name, down, path, .. } in named {
            let pair = pairs.entry(version.clone()).or_default();
            let place = if down { &mut pair.down } else { &mut pair.up };
            if let Some(other) = place {
                return Err(wrong(format!("version {version} is there twice: {} and {}", short(other), short(&path)))
                    .with_hint("give one of them a version of its own"));
            }
            *place = Some(path);
            if !down || pair.name.is_empty() {
                pair.name = name;
            }
        }
        let mut migrations = Vec::new();
        for (version, pair) in pairs {
            let Some(up) = &pair.up else {
                let down = pair.down.as_deref().map(short).unwrap_or_default();
                return Err(wrong(format!("{down}: version {version} has a down script and no up script"))
                    .with_hint("add the up script, or remove the down script"));
            };
            let outside = layout == Layout::Diesel && not_in_transaction(up);
            let mut script = read(up)?;
            script.outside_transaction |= outside;
            migrations.push(Migration { version, description: pair.name, up: script, down: pair.down, outside });
        }
        Ok(Self { layout, migrations })
    }

    /// Finds a migration.
    pub fn find(&self, version: &MigrationVersion) -> Option<&Migration> {
        let at = self.migrations.binary_search_by(|migration| migration.version.cmp(version)).ok()?;
        self.migrations.get(at)
    }
}

fn wrong(message: String) -> StepError {
    StepError::permanent(message)
}

/// Names a file as messages do: with the directory that it stands in, which for diesel says more.
fn short(path: &Path) -> String {
    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    match path.parent() {
        Some(parent) if matches!(&*name(path), "up.sql" | "down.sql") => format!("{}/{}", name(parent), name(path)),
        _ => name(path),
    }
}

fn read(path: &Path) -> Result<Script, StepError> {
    let bytes = std::fs::read(path).map_err(|error| {
        wrong(format!("{} cannot be read", short(path)))
            .with_cause(&error)
            .with_hint(format!("look at {}: may this user read it?", path.display()))
    })?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let line = error.as_bytes()[..error.utf8_error().valid_up_to()].iter().filter(|b| **b == b'\n').count() + 1;
        wrong(format!("{}, line {line}: not UTF-8", short(path))).with_hint("save the script as UTF-8")
    })?;
    Ok(Script::new(short(path), text))
}

/// Lists files and directories, sorted; what is hidden belongs to nobody's layout.
fn entries(path: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>), StepError> {
    let failed = |error: std::io::Error| {
        wrong(format!("the directory of the migrations, {}, cannot be read", path.display()))
            .with_cause(&error)
            .with_hint("check `directory`: relative paths start from the directory of the pipeline file")
    };
    let (mut files, mut folders) = (Vec::new(), Vec::new());
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let mut kind = entry.file_type().map_err(failed)?;
        if kind.is_symlink() {
            kind = std::fs::metadata(entry.path()).map_err(failed)?.file_type();
        }
        if kind.is_dir() { folders.push(entry.path()) } else { files.push(entry.path()) }
    }
    files.sort();
    folders.sort();
    Ok((files, folders))
}

fn detect(path: &Path, files: &[PathBuf], folders: &[PathBuf]) -> Result<Layout, StepError> {
    let fits = |layout: Layout| match layout {
        Layout::Diesel => folders.iter().find(|path| diesel(path).is_ok_and(|named| !named.is_empty())),
        _ => files.iter().find(|path| matches!(file(layout, path), Ok(Some(_)))),
    };
    // The names of golang-migrate are among those of sqlx: it is asked for by name.
    let found: Vec<_> = [Layout::Sqlx, Layout::Diesel, Layout::Flyway]
        .into_iter()
        .filter_map(|layout| fits(layout).map(|example| (layout, example)))
        .collect();
    match found.as_slice() {
        [(layout, _)] => Ok(*layout),
        [] => Err(wrong(format!("{} holds no migrations of a known layout", path.display())).with_hint(
            "name them as sqlx (V_name.up.sql), diesel (V_name/up.sql), golang-migrate or Flyway (V1__name.sql) do, or correct `directory`",
        )),
        [(one, first), (other, second), ..] => Err(wrong(format!(
            "{} is ambiguous: {} fits the layout of {one}, {} that of {other}",
            path.display(),
            short(first),
            short(second)
        ))
        .with_hint(format!("write `layout: {one}` or `layout: {other}`, and move the rest elsewhere"))),
    }
}

/// Reads the name of a file; `None` if it is nobody's business.
fn file(layout: Layout, path: &Path) -> Result<Option<Named>, StepError> {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
        return match path.extension().is_some_and(|extension| extension == "sql") {
            true => Err(wrong(format!("the name of {} is not UTF-8", path.display())).with_hint("rename it")),
            false => Ok(None),
        };
    };
    let Some(stem) = name.strip_suffix(".sql") else { return Ok(None) };
    match layout {
        Layout::Flyway => flyway(name, stem, path),
        _ => numbered(layout, name, stem, path),
    }
}

fn numbered(layout: Layout, name: &str, stem: &str, path: &Path) -> Result<Option<Named>, StepError> {
    let (stem, down, simple) = match (stem.strip_suffix(".up"), stem.strip_suffix(".down")) {
        (Some(stem), _) => (stem, false, false),
        (_, Some(stem)) => (stem, true, false),
        _ => (stem, false, true),
    };
    if !stem.starts_with(|c: char| c.is_ascii_digit()) {
        return Ok(None);
    }
    let Some((version, rest)) = stem.split_once('_') else {
        return Err(misnamed(name, "there is no name after the version", "VERSION_name.up.sql"));
    };
    if layout == Layout::GolangMigrate && simple {
        return Err(misnamed(name, "it is neither .up.sql nor .down.sql", "VERSION_name.up.sql"));
    }
    let number: Option<i64> = version.parse().ok();
    let Some(number) = number.and_then(|number| u64::try_from(number).ok()).filter(|number| *number > 0) else {
        return Err(misnamed(name, "its version is not a whole number from 1 on", "VERSION_name.up.sql"));
    };
    Ok(Some(Named {
        version: MigrationVersion::number(number),
        name: rest.replace('_', " "),
        down,
        path: path.to_owned(),
    }))
}

fn flyway(name: &str, stem: &str, path: &Path) -> Result<Option<Named>, StepError> {
    if stem.starts_with("R__") {
        return Err(wrong(format!("{name} is a repeatable migration, which has no version and no undo")).with_hint(
            "make it a versioned one (V…__name.sql with its U…__name.sql), or run it as a `postgres.sql` step",
        ));
    }
    let down = stem.starts_with('U');
    let Some(rest) = stem.strip_prefix(['V', 'U']).filter(|rest| rest.starts_with(|c: char| c.is_ascii_digit())) else {
        return Ok(None);
    };
    let Some((version, rest)) = rest.split_once("__") else {
        return Err(misnamed(name, "there are no two underscores after the version", "V1__name.sql"));
    };
    let version = version.replace('_', ".").parse::<MigrationVersion>().map_err(|error| {
        wrong(format!("the name {name} cannot be read")).with_cause(&error).with_hint("write it as V1__name.sql")
    })?;
    Ok(Some(Named { version, name: rest.replace('_', " "), down, path: path.to_owned() }))
}

/// Reads the name of a directory of diesel's, and which of its two scripts there are.
fn diesel(path: &Path) -> Result<Vec<Named>, StepError> {
    let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return Ok(Vec::new()) };
    let scripts: Vec<_> =
        [("up.sql", false), ("down.sql", true)].into_iter().filter(|(file, _)| path.join(file).is_file()).collect();
    if !name.starts_with(|c: char| c.is_ascii_digit()) || scripts.is_empty() {
        return Ok(Vec::new());
    }
    // As diesel does: up to the first underscore, without the dashes.
    let (version, rest) = name.split_once('_').unwrap_or((name, ""));
    let version: MigrationVersion = version.replace('-', "").parse().map_err(|error| {
        wrong(format!("the name of the directory {name} cannot be read"))
            .with_cause(&error)
            .with_hint("write it as 2026-01-31-120000_name")
    })?;
    Ok(scripts
        .into_iter()
        .map(|(file, down)| Named {
            version: version.clone(),
            name: rest.replace('_', " "),
            down,
            path: path.join(file),
        })
        .collect())
}

/// Tells whether diesel is told to run a migration without a transaction.
fn not_in_transaction(up: &Path) -> bool {
    let metadata = std::fs::read_to_string(up.with_file_name("metadata.toml")).unwrap_or_default();
    metadata.lines().any(|line| {
        line.split('#')
            .next()
            .and_then(|line| line.split_once('='))
            .is_some_and(|(key, value)| key.trim() == "run_in_transaction" && value.trim() == "false")
    })
}

fn misnamed(name: &str, why: &str, how: &str) -> StepError {
    wrong(format!("the name {name} cannot be read: {why}"))
        .with_hint(format!("write it as {how}, or move it elsewhere"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = home.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        home
    }

    fn read(files: &[(&str, &str)], layout: Option<Layout>) -> Result<Vec<String>, String> {
        let read = Directory::read(directory(files).path(), layout).map_err(|error| {
            format!("{error} {:?} | {}", error.causes(), error.hint().expect("every error says what to do"))
        })?;
        Ok(read
            .migrations
            .iter()
            .map(|m| format!("{} {} {} {}", read.layout, m.version, m.description, m.down.is_some()))
            .collect())
    }

    #[test]
    fn each_layout_is_told_from_its_names() {
        let sqlx = [("2_b_c.sql", ""), ("1_a.up.sql", ""), ("1_a.down.sql", ""), ("README.md", ""), (".x.sql", "")];
        assert_eq!(read(&sqlx, None).unwrap(), ["sqlx 1 a true", "sqlx 2 b c false"]);
        let diesel = [
            ("2026-01-31-120000_a/up.sql", ""),
            ("2026-01-31-120000_a/down.sql", ""),
            ("00000000000000_setup/up.sql", ""),
        ];
        assert_eq!(read(&diesel, None).unwrap(), ["diesel 00000000000000 setup false", "diesel 20260131120000 a true"]);
        let flyway = [("V1.10__b.sql", ""), ("V1_2__a.sql", ""), ("U1.2__a.sql", "")];
        assert_eq!(read(&flyway, None).unwrap(), ["flyway 1.2 a true", "flyway 1.10 b false"]);
        let golang = [("000001_a.up.sql", ""), ("000001_a.down.sql", "")];
        assert_eq!(read(&golang, Some(Layout::GolangMigrate)).unwrap(), ["golang-migrate 1 a true"]);
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        type Case<'a> = (&'a [(&'a str, &'a str)], Option<Layout>, &'a str);
        let cases: [Case<'_>; 9] = [
            (&[("1_a.sql", ""), ("V1__a.sql", "")], None, "1_a.sql fits the layout of sqlx, V1__a.sql that of flyway"),
            (&[("README.md", "")], None, "holds no migrations"),
            (&[("1_a.sql", ""), ("01_b.sql", "")], None, "version 1 is there twice: 01_b.sql and 1_a.sql"),
            (&[("1_a.up.sql", ""), ("2_b.down.sql", "")], None, "2_b.down.sql: version 2 has a down script and no up"),
            (&[("1_a.sql", ""), ("2b_a.sql", "")], None, "2b_a.sql"),
            (&[("1_a.sql", "")], Some(Layout::GolangMigrate), "neither .up.sql nor .down.sql"),
            (&[("V1__a.sql", ""), ("R__v.sql", "")], None, "R__v.sql is a repeatable"),
            (&[("V1_a.sql", "")], Some(Layout::Flyway), "no two underscores"),
            (&[("0_a.sql", "")], Some(Layout::Sqlx), "from 1 on"),
        ];
        for (files, layout, expected) in cases {
            let error = read(files, layout).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let home = directory(&[]);
        std::fs::write(home.path().join("1_a.sql"), b"select 1;\n-- \xff").unwrap();
        let error = Directory::read(home.path(), None).unwrap_err();
        assert_eq!(error.message(), "1_a.sql, line 2: not UTF-8");
    }

    #[test]
    fn diesel_says_beside_the_script_that_it_runs_outside_of_a_transaction() {
        let home = directory(&[("1_a/up.sql", ""), ("1_a/metadata.toml", "run_in_transaction = false # slow\n")]);
        assert!(Directory::read(home.path(), None).unwrap().migrations[0].up.outside_transaction);
    }
}
