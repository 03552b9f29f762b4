//! Files of this machine that survive a crash: private, durable, and complete before they have a name.

pub(crate) use upgrade_core::durable::{
    create_directories, failed, free, parent, place, remove, remove_made, sync_directory, temporary, topmost_missing,
};
