//! A small HTTP service that keeps notes: `GET /health`, `GET /version`, `GET /notes` and
//! `POST /notes`. What its releases have in common.

mod client;
mod config;
mod daemon;
mod server;
mod store;

use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;

pub use config::Config;
pub use store::{FileStore, Store, quoted};

/// Describes what one release does differently from the others.
pub struct Release {
    /// The version that `GET /version` answers.
    pub version: &'static str,
    /// Reads what the service needs from its configuration; opens its notes. The path is the directory
    /// of the configuration.
    pub settings: fn(&Config, &Path) -> Result<Settings, String>,
    /// Tells whether the service can do its work; `GET /health` answers 503 where it cannot.
    pub health: fn(&Config) -> Result<(), String>,
}

/// Holds what the service needs to run.
pub struct Settings {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Where its notes are.
    pub store: Box<dyn Store>,
    /// How many requests it answers at a time.
    pub workers: usize,
}

const USAGE: &str =
    "usage: notes (start|stop|status|serve) CONFIG | notes get URL | notes post URL TEXT | notes version";

impl Release {
    /// Carries out the command line that the process was given.
    pub fn run(&self) -> ExitCode {
        let arguments: Vec<String> = std::env::args().skip(1).collect();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let result = match arguments[..] {
            ["start", config] => daemon::start(Path::new(config)),
            ["stop", config] => daemon::stop(Path::new(config)),
            ["status", config] => daemon::status(Path::new(config)),
            ["serve", config] => server::serve(self, Path::new(config)),
            ["get", url] => client::request("GET", url, ""),
            ["post", url, text] => client::request("POST", url, text),
            ["version"] => Ok(self.version.to_owned()),
            _ => Err(USAGE.to_owned()),
        };
        match result {
            Ok(said) => {
                println!("{said}");
                ExitCode::SUCCESS
            }
            Err(why) => {
                eprintln!("notes {}: {why}", self.version);
                ExitCode::FAILURE
            }
        }
    }
}
