//! What the examples share: a step and a check of one's own.

mod point_link;

pub use point_link::{LeadsTo, PointLink};
