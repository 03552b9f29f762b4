//! Paths of this machine as targets of an upgrade.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::names::LockName;
use upgrade_core::target::Target;

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
        let path = path.into();
        let lock = LockName::path(&path).unwrap_or_else(|_| Self::spelled("path-digest", &path.to_string_lossy()));
        Arc::new(Self { lock })
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
        machine_id().await
    }
}

/// Reads what tells this machine from another: `machine-id(5)`, else the host's name.
async fn machine_id() -> Result<String, StepError> {
    for path in ["/etc/machine-id", "/var/lib/dbus/machine-id"] {
        if let Ok(text) = tokio::fs::read_to_string(path).await
            && !text.trim().is_empty()
        {
            return Ok(format!("machine-id {}", text.trim()));
        }
    }
    Ok(format!("host {}", rustix::system::uname().nodename().to_string_lossy()))
}
