//! Configuration files: rules on plain data, and editors that keep comments and order.

mod diff;
mod env;
mod json;
mod path;
mod rules;
mod text;
mod toml;
mod validate;
mod value;
mod yaml;

pub use path::{ConfigPath, PathError, Segment};
pub use rules::{Assignment, Rule, RuleError, Scalar};
pub use text::{Format, Malformed, MigrateError};
pub use validate::{Deprecated, Type, Validation};
pub use value::ConfigValue;

pub(crate) use diff::{changed_paths, diff};
pub(crate) use rules::Resolved;
pub(crate) use text::{Migrated, migrate};
pub(crate) use validate::{Finding, deprecations, validate};
