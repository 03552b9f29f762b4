//! What a backfill is made of.
//!
//! - `relation`: what the catalog says about the table, its keys and what stands in the way;
//! - [`plan`]: what is written where, as undo records keep it;
//! - [`statements`]: the SQL for that, as text;
//! - [`bookmark`]: the ranges and how far each is done, in the database itself;
//! - [`throttle`]: how large a batch is and how long the pause after it, as pure functions;
//! - [`budget`]: what the limits are, and the measurements that are held against them;
//! - `pace`: what the workers share: pauses, progress, the order to stop;
//! - `conduct`: what goes on beside them: progress, vacuum, an operator's pause, the end;
//! - `workers`: the walk forward; `restore`: the way back; `vacuum`: what keeps the table small.

pub mod bookmark;
pub mod budget;
pub(crate) mod conduct;
pub(crate) mod pace;
pub mod plan;
pub(crate) mod relation;
pub(crate) mod restore;
pub mod statements;
pub mod throttle;
pub(crate) mod vacuum;
pub(crate) mod workers;
