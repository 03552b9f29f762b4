//! Versioned SQL scripts: how directories lay them out, and what a database knows of them.
//!
//! - [`layout`]: the files of a directory, as sqlx, diesel, golang-migrate and Flyway name them;
//! - [`script`]: what a script holds, as far as it decides how it is run and what it discards;
//! - [`history`]: the table that says what was applied;
//! - [`adopt`]: the history of another tool, taken over;
//! - [`compare`]: what is pending, and where files and history contradict each other.

pub mod adopt;
pub mod compare;
pub mod history;
pub mod layout;
pub mod script;
pub mod version;

pub use adopt::Tool;
pub use compare::{Drift, Pending, Terms};
pub use history::{History, HistoryTable};
pub use layout::{Directory, Layout, Migration};
pub use script::Script;
pub use version::MigrationVersion;
