//! Paths of this machine as targets of an upgrade.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::names::LockName;
use upgrade_core::registry::{BuildContext, BuildError, Registry};
use upgrade_core::target::{Target, this_machine};

/// Configures `host.path`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PathConfig {
    /// The file or directory that the upgrade changes.
    pub path: PathBuf,
}

pub(crate) fn register(registry: &mut Registry) {
    registry.target(
        "host.path",
        "Names a file or directory that is changed, for steps that learn only on the way what they change",
        |config: PathConfig, cx: &BuildContext| Ok::<_, BuildError>(MachineTarget::of_path(&cx.path(&config.path))),
    );
}

/// Names a path of this machine, or something else on it, that a step changes.
#[derive(Debug, Clone)]
pub struct MachineTarget {
    lock: LockName,
}

impl MachineTarget {
    /// Names a path: a file, or a directory with all that is below it.
    ///
    /// A path that no lock name can spell (it holds a control character) is named by its digest.
    pub fn path(path: impl Into<PathBuf>) -> Arc<dyn Target> {
        Arc::new(Self::of_path(&path.into()))
    }

    fn of_path(path: &Path) -> Self {
        let lock = LockName::path(path).unwrap_or_else(|_| Self::spelled("path-digest", &path.to_string_lossy()));
        Self { lock }
    }

    /// Names a service of this machine.
    pub fn service(name: &str) -> Arc<dyn Target> {
        let lock = LockName::new("service", name).unwrap_or_else(|_| Self::spelled("service-digest", name));
        Arc::new(Self { lock })
    }

    fn spelled(namespace: &str, resource: &str) -> LockName {
        LockName::new(namespace, &upgrade_core::sealed::sha256_hex(resource.as_bytes()))
            .expect("a digest is printable and not empty")
    }
}

#[async_trait]
impl Target for MachineTarget {
    fn lock(&self) -> LockName {
        self.lock.clone()
    }

    async fn identity(&self, _cx: &Context) -> Result<String, StepError> {
        Ok(this_machine())
    }
}
