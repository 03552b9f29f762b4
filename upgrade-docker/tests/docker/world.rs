//! What the tests share: an engine, the kinds of this crate on it, and a corner of it that is one
//! test's own.

#![cfg(test)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use upgrade_core::AnyStep;
use upgrade_core::check::Check;
use upgrade_core::registry::{AnyTarget, BuildContext, BuildError, Registry};
use upgrade_docker::EngineConfig;
use upgrade_testbed::docker::Engine;

pub(crate) fn registry() -> Registry {
    let mut registry = Registry::new();
    upgrade_docker::register(&mut registry);
    registry
}

/// Gives the engine at a place as a target.
pub(crate) fn target(host: &str) -> upgrade_docker::Engine {
    let config = EngineConfig { host: Some(host.to_owned()), ..EngineConfig::default() };
    upgrade_docker::Engine::from_config(config, &BuildContext::new("/")).unwrap()
}

/// Gives the context in which kinds are made, the engine known as `engine`.
pub(crate) fn build_context(host: &str) -> BuildContext {
    BuildContext::new("/").with_target("engine", AnyTarget::new("docker", target(host)))
}

/// Makes a step as a pipeline file does.
#[allow(dead_code)]
pub(crate) fn step(engine: &Engine, kind: &str, with: Value) -> Result<AnyStep, BuildError> {
    registry().make_step(kind, with, &build_context(engine.host()))
}

/// Makes a check as a pipeline file does.
#[allow(dead_code)]
pub(crate) fn check(engine: &Engine, kind: &str, with: Value) -> Result<Arc<dyn Check>, BuildError> {
    registry().make_check(kind, with, &build_context(engine.host()))
}

/// Compares with a golden file; `UPDATE_GOLDEN=1` writes it.
#[allow(dead_code)]
pub(crate) fn golden(name: &str, undo: &impl serde::Serialize, replace: &[(&str, &str)]) -> Value {
    let mut text = serde_json::to_string_pretty(undo).unwrap() + "\n";
    for (from, to) in replace {
        text = text.replace(from, to);
    }
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    assert_eq!(text, std::fs::read_to_string(&path).unwrap(), "{}", path.display());
    serde_json::from_str(&text).unwrap()
}

/// Holds a corner of an engine: everything whose name begins with its prefix, removed on drop.
pub(crate) struct Corner {
    pub(crate) engine: Engine,
    pub(crate) prefix: String,
}

impl Corner {
    /// Takes a corner of the shared engine; `None` where there is none.
    pub(crate) fn shared(what: &str) -> Option<Self> {
        upgrade_testbed::docker::shared().map(|engine| Self::of(&engine, what))
    }

    pub(crate) fn of(engine: &Engine, what: &str) -> Self {
        Self { prefix: engine.unique(what), engine: engine.clone() }
    }

    /// A name in this corner.
    pub(crate) fn name(&self, what: &str) -> String {
        format!("{}-{what}", self.prefix)
    }

    /// A directory of this machine that goes with the corner; pipelines name it `/tmp/PREFIX`.
    pub(crate) fn directory(&self) -> PathBuf {
        Path::new("/tmp").join(&self.prefix)
    }

    /// What stands there, as the engine lists it: `names` of containers, networks, volumes, images.
    pub(crate) fn list(&self, list: &[&str], format: &str) -> Vec<String> {
        let mut arguments = list.to_vec();
        arguments.extend(["--format", format]);
        let all = self.engine.docker(&arguments);
        let mut names: Vec<_> = all.lines().filter(|name| name.starts_with(&self.prefix)).map(str::to_owned).collect();
        names.sort_unstable();
        names
    }
}

impl Drop for Corner {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(self.directory());
        for (list, remove, format) in [
            (&["ps", "--all"][..], &["rm", "--force", "--volumes"][..], "{{.Names}}"),
            (&["network", "ls"], &["network", "rm"], "{{.Name}}"),
            (&["volume", "ls"], &["volume", "rm", "--force"], "{{.Name}}"),
            // With its parents, another test's build would lose what it just found in the cache.
            (&["image", "ls"], &["image", "rm", "--force", "--no-prune"], "{{.Repository}}:{{.Tag}}"),
        ] {
            // Another test may have removed something between the list and its reading.
            let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.list(list, format)));
            for name in found.unwrap_or_default() {
                let _ = self.engine.command(remove).arg(name).output();
            }
        }
    }
}
