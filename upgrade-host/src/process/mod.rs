//! Programs and services under control: nothing of them runs on behind the step's back.

mod output;
pub(crate) mod program;
pub(crate) mod service_control;
