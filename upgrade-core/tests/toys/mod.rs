//! Kinds that do nothing, for tests of what names them.

use std::collections::BTreeMap;

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use upgrade_core::AnyStep;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::{CheckError, StepError};
use upgrade_core::names::LockName;
use upgrade_core::registry::{BuildError, Registry};
use upgrade_core::secret::SecretRef;
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::target::Target;
use upgrade_core::units::{Bytes, Share};
use upgrade_core::verdict::Verdict;

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct BackupConfig {
    target: String,
    dir: String,
    prove: Option<Prove>,
}

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Prove {
    Restore,
    List,
}

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct MigrateConfig {
    target: String,
    dir: String,
    #[serde(default)]
    lossy: bool,
}

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ReleaseConfig {
    root: String,
    archive: String,
    sha256: Option<String>,
    keep: Option<u32>,
    #[serde(default)]
    rules: Vec<Rule>,
}

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Rule {
    path: String,
    mode: u32,
}

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct FilesConfig {
    paths: Vec<String>,
    to: String,
}

struct Toy<C>(C);

macro_rules! toy {
    ($config:ty, $kind:literal) => {
        #[async_trait]
        impl Step for Toy<$config> {
            const KIND: &'static str = $kind;
            type Undo = Value;
            type Output = Value;
            async fn prepare(&self, _: &Context) -> Result<Prepared<Value, Value>, StepError> {
                Ok(Prepared::change(Value::Null, []))
            }
            async fn apply(&self, _: &Context, _: &Value) -> Result<Value, StepError> {
                Ok(Value::Null)
            }
            fn definition(&self) -> Value {
                json!(self.0)
            }
        }

        #[async_trait]
        impl Rollback for Toy<$config> {
            async fn rollback(&self, _: &Context, _: &Value, _: Option<&Value>) -> Result<(), StepError> {
                Ok(())
            }
        }
    };
}

toy!(BackupConfig, "db.backup");
toy!(MigrateConfig, "db.migrate");
toy!(ReleaseConfig, "host.release");
toy!(FilesConfig, "host.backup");

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Disk {
    path: String,
    free: Bytes,
}

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Get {
    url: String,
    #[serde(default)]
    json: BTreeMap<String, Value>,
}

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Probe {
    url: String,
    max_error_rate: Option<Share>,
    max_p95_increase: Option<Share>,
}

struct Ask(&'static str, Value);

#[async_trait]
impl Check for Ask {
    async fn check(&self, _: &Context) -> Result<Verdict, CheckError> {
        Ok(Verdict::pass(""))
    }
    fn kind(&self) -> &str {
        self.0
    }
    fn definition(&self) -> Value {
        self.1.clone()
    }
}

#[derive(Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Database {
    url: SecretRef,
}

#[async_trait]
impl Target for Database {
    fn lock(&self) -> LockName {
        LockName::new("db", self.url.place()).expect("a variable is a name")
    }
    async fn identity(&self, _: &Context) -> Result<String, StepError> {
        Ok(String::new())
    }
}

pub(crate) fn registry() -> Registry {
    let mut registry = Registry::new();
    registry
        .target("db", "A database.", |config: Database, _| Ok(config))
        .step("db.backup", "Backs a database up.", |config: BackupConfig, cx| {
            cx.target::<Database>(&config.target)?;
            Ok(AnyStep::reversible(Toy(config)))
        })
        .step("db.migrate", "Migrates a database.", |config: MigrateConfig, cx| {
            cx.target::<Database>(&config.target)?;
            if config.lossy {
                return Ok(AnyStep::irreversible(Toy(config), "columns are dropped"));
            }
            Ok(AnyStep::reversible(Toy(config)))
        })
        .step("host.release", "Switches a release.", |config: ReleaseConfig, _| {
            if let Some(at) = config.rules.iter().position(|rule| rule.mode > 0o777) {
                return Err(BuildError::new("the mode has bits that no file has")
                    .at(format!("rules.{at}.mode"))
                    .with_hint("write it as 0o644"));
            }
            Ok(AnyStep::reversible(Toy(config)))
        })
        .step("host.backup", "Backs files up.", |config: FilesConfig, _| Ok(AnyStep::reversible(Toy(config))))
        .check("host.disk", "Asks for free space.", |config: Disk, _| Ok(Ask("host.disk", json!(config))))
        .check("http.get", "Asks a server once.", |config: Get, _| Ok(Ask("http.get", json!(config))))
        .check("http.probe", "Asks a server often.", |config: Probe, _| Ok(Ask("http.probe", json!(config))));
    registry
}
