//! `host.file` as a check: a file that is there, and what it says.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::AsyncReadExt;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::verdict::Verdict;

use crate::version_text::version_in;

/// How much of a file is read.
const MOST: u64 = 1 << 20;

/// Configures the check `host.file`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileCheckConfig {
    /// The file or directory.
    pub path: PathBuf,
    /// A text that the file must contain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contains: Option<String>,
    /// Facts to read from a JSON file: a name, and the pointer to its value. Without any, the
    /// first version in the file is the fact `version`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub facts: BTreeMap<String, String>,
}

/// Looks whether a file is there and reads a version from it.
#[derive(Debug)]
pub struct FileCheck {
    config: FileCheckConfig,
    path: PathBuf,
}

impl FileCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// None at present.
    pub fn from_config(config: FileCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let path = cx.path(&config.path);
        Ok(Self { config, path })
    }
}

async fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut contents = Vec::new();
    if tokio::fs::metadata(path).await?.is_file() {
        tokio::fs::File::open(path).await?.take(MOST).read_to_end(&mut contents).await?;
    }
    Ok(contents)
}

#[async_trait]
impl Check for FileCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let shown = self.config.path.display();
        let contents = match read(&self.path).await {
            Ok(contents) => contents,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok(Verdict::fail(format!("{shown} is not there")).with_hint("check the path and what makes it"));
            }
            Err(error) => {
                return Err(CheckError::permanent(format!("{shown} cannot be read"))
                    .with_cause(&error)
                    .with_hint("check its permissions for the account that runs the upgrade"));
            }
        };
        let text = String::from_utf8_lossy(&contents);
        if let Some(expected) = self.config.contains.as_deref().filter(|expected| !text.contains(*expected)) {
            return Ok(Verdict::fail(format!("{shown} does not contain `{expected}`")).with_hint("look into the file"));
        }
        let mut verdict = Verdict::pass(format!("{shown} is there"));
        if self.config.facts.is_empty() {
            if let Some(version) = version_in(&text) {
                verdict = verdict.with_fact("version", version);
            }
            return Ok(verdict);
        }
        let json: Value = serde_json::from_slice(&contents).map_err(|error| {
            CheckError::permanent(format!("{shown} is not JSON, at line {}", error.line()))
                .with_hint("facts are read from JSON; drop `facts` to find a version in any text")
        })?;
        for (name, pointer) in &self.config.facts {
            let value = json.pointer(pointer).ok_or_else(|| {
                CheckError::permanent(format!("{shown} has nothing at {pointer}")).with_hint("look into the file")
            })?;
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            verdict = verdict.with_fact(name, cx.mask(&value));
        }
        Ok(verdict)
    }

    fn kind(&self) -> &str {
        "host.file"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
