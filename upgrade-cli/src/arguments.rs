//! The command line: the options that every command takes, and those that several share.

use std::path::PathBuf;

use clap::{Args, Parser, ValueEnum};
use upgrade_core::file::LoadOptions;

use crate::commands::Command;

const EXAMPLES: &str = "\
Examples:
  upgrade init                         write a first pipeline file
  upgrade plan upgrade.yaml            show what it would change
  upgrade run upgrade.yaml --to 1.1.0  carry it out
  upgrade status                       see where the latest run stands
  upgrade rollback                     put everything back, until it is committed

Exit status:
  0  done
  1  internal error or I/O; the run, if any, can be resumed
  2  wrong usage, or an invalid pipeline
  3  a check failed, or stayed unknown, before anything was changed
  4  the run failed and everything is back as it was
  5  stuck, or restored but unhealthy: an operator must decide
  6  held, stopped, or applied and not yet committed: resumable
  7  refused: another run, a rule, or a pipeline that is not the run's";

/// Carries out an upgrade of a running system as one transaction.
///
/// It completes, or everything it touched is back as it was; a crash at any instant changes
/// neither.
#[derive(Debug, Parser)]
#[command(name = "upgrade", version, after_help = EXAMPLES, max_term_width = 100)]
#[command(subcommand_required = true, arg_required_else_help = true, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How results are written to stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// The directory that keeps the journal of every run.
    #[arg(long, global = true, value_name = "DIR", default_value = ".upgrade", env = "UPGRADE_STATE_DIR")]
    pub(crate) state_dir: PathBuf,
    /// The journal, if it is not in the state directory: `file:DIR` or, where the adapter is built
    /// in, `postgres://USER@HOST:PORT/DATABASE`. A password stands in PGPASSWORD or ~/.pgpass, or in
    /// the URL of the variable.
    #[arg(long, global = true, value_name = "URL", env = "UPGRADE_JOURNAL", hide_env_values = true)]
    pub(crate) journal: Option<String>,
    /// How results are written to stdout.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub(crate) output: Output,
    /// Say only what went wrong and how it ended.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(crate) quiet: bool,
    /// Say more; twice, also what the library does.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// No colours, as NO_COLOR does.
    #[arg(long, global = true)]
    pub(crate) no_color: bool,
    /// Answer every question with yes.
    #[arg(short = 'y', long, global = true)]
    pub(crate) yes: bool,
}

/// A pipeline file and what is laid over it.
#[derive(Debug, Clone, Args)]
pub(crate) struct PipelineFile {
    /// The pipeline file.
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) overlay: Overlay,
}

/// What is laid over a pipeline file.
#[derive(Debug, Clone, Args)]
pub(crate) struct Overlay {
    /// The environment: the file's overlay of that name.
    #[arg(long, value_name = "NAME")]
    env: Option<String>,
    /// The version to upgrade to, in place of the file's.
    #[arg(long, value_name = "VERSION")]
    to: Option<String>,
    /// A variable, in place of the file's; may be given several times.
    #[arg(long = "var", value_name = "NAME=VALUE", value_parser = variable)]
    variables: Vec<(String, String)>,
}

fn variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("write it NAME=VALUE".into()),
    }
}

impl Overlay {
    pub(crate) fn is_empty(&self) -> bool {
        self.env.is_none() && self.to.is_none() && self.variables.is_empty()
    }

    /// Turns the options into the loader's.
    pub(crate) fn load_options(&self) -> LoadOptions {
        // People and tags write v1.1.0.
        let plain = |text: &String| match text.strip_prefix('v') {
            Some(rest) if rest.starts_with(|c: char| c.is_ascii_digit()) => rest.to_owned(),
            _ => text.clone(),
        };
        LoadOptions {
            environment: self.env.clone(),
            to: self.to.as_ref().map(plain),
            variables: self.variables.iter().cloned().collect(),
        }
    }
}

/// A run.
#[derive(Debug, Clone, Args)]
pub(crate) struct Selector {
    /// The run, or the first characters of its id; the latest if absent.
    #[arg(value_name = "RUN")]
    pub(crate) run: Option<String>,
}

/// An open run.
#[derive(Debug, Clone, Args)]
pub(crate) struct OpenSelector {
    /// The run, or the first characters of its id; the latest open one if absent.
    #[arg(value_name = "RUN")]
    pub(crate) run: Option<String>,
}
