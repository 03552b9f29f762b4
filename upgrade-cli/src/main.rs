//! The `upgrade` command: a small reference consumer of `upgrade-core`.

mod arguments;
mod asking;
mod commands;
mod console;
mod copy;
mod exit;
mod failure;
mod interruption;
mod place;
mod recorded;
mod render;
mod runs;
mod session;

use std::process::ExitCode;

use clap::Parser;
use serde_json::json;

use crate::arguments::Cli;
use crate::console::Console;
use crate::exit::Exit;
use crate::session::{Ending, Session};

/// Numbers the format of JSON output.
const OUTPUT_FORMAT: &str = "upgrade/1";

fn main() -> ExitCode {
    let cli = Cli::parse();
    trace(cli.global.verbose);
    let session = Session::new(cli.global);
    let console = session.console;
    // A document is in a format of its own: nothing may stand beside it.
    let framed = console.json() && !cli.command.is_document();
    let name = cli.command.name();
    if framed && let Err(error) = console.object(&json!({ "format": OUTPUT_FORMAT, "command": name })) {
        return end(console, framed, Err(error.into())).into();
    }
    let result = cli.command.execute(&session);
    end(console, framed, result).into()
}

fn end(console: Console, framed: bool, result: failure::Result<Ending>) -> Exit {
    let (exit, object) = match result {
        Ok(ending) => (ending.exit, ending.object),
        Err(failure) => {
            console.alarm(failure.text(console.err()));
            (failure.exit, failure.object())
        }
    };
    if framed && let Err(error) = console.object(&object) {
        console.alarm(failure::Failure::from(error).text(console.err()));
        return exit.max(Exit::Internal);
    }
    exit
}

/// Shows what the library does, where it was asked for: twice -v.
fn trace(verbose: u8) {
    if verbose < 2 {
        return;
    }
    let level = if verbose > 2 {
        "upgrade_core=trace,upgrade_docker=trace,upgrade_host=trace,upgrade_k8s=trace,upgrade_postgres=trace,info"
    } else {
        "upgrade_core=debug,upgrade_docker=debug,upgrade_host=debug,upgrade_k8s=debug,upgrade_postgres=debug,info"
    };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new(level))
        .with_writer(std::io::stderr)
        .init();
}
