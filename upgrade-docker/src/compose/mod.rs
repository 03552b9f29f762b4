//! Projects of Docker Compose: its program, its files, and the containers that it made.

pub(crate) mod containers;
pub(crate) mod edit;
pub(crate) mod kept_file;
pub(crate) mod layout;
pub(crate) mod model;
pub(crate) mod program;
