//! Runs a command with a real service of its own, which ends with it.
//!
//! ```text
//! testbed postgres [15|16|18] COMMAND [ARGUMENT…]
//! ```
//!
//! The command finds the service's URL in `DATABASE_URL`; its exit status is that of this program.

use std::process::{Command, ExitCode};

use upgrade_testbed::postgres::{self, Version};

const USAGE: &str = "usage: testbed postgres [15|16|18] COMMAND [ARGUMENT…]";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (version, command) = match arguments.split_first() {
        Some((service, rest)) if service == "postgres" => match rest.split_first() {
            Some((version, rest)) if version == "15" => (Version::V15, rest),
            Some((version, rest)) if version == "16" => (Version::V16, rest),
            Some((version, rest)) if version == "18" => (Version::V18, rest),
            _ => (Version::V15, rest),
        },
        _ => (Version::V15, &[][..]),
    };
    let Some((program, arguments)) = command.split_first() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let Some(server) = postgres::own(version, &[]) else { return ExitCode::from(1) };
    let database = server.database();
    let status = Command::new(program).args(arguments).env("DATABASE_URL", database.url()).status();
    drop(database);
    match status {
        Ok(status) => ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)),
        Err(error) => {
            eprintln!("{program} cannot be started: {error}");
            ExitCode::from(1)
        }
    }
}
