//! Secrets as references, resolved at use and masked wherever text leaves the program.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
pub use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;

use crate::error::StepError;

/// Refers to a secret by scheme and place: `{ env: DATABASE_URL }`, `{ file: /run/secrets/db }`.
///
/// Only the reference is ever stored or shown.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SecretRef {
    scheme: String,
    place: String,
}

impl SecretRef {
    /// Refers to an environment variable.
    pub fn env(name: impl Into<String>) -> Self {
        Self { scheme: "env".into(), place: name.into() }
    }

    /// Refers to a file, without the line end that its last line may have.
    pub fn file(path: impl Into<String>) -> Self {
        Self { scheme: "file".into(), place: path.into() }
    }

    /// Refers to a place of a scheme that a [`SecretSource`] was registered for.
    pub fn other(scheme: impl Into<String>, place: impl Into<String>) -> Self {
        Self { scheme: scheme.into(), place: place.into() }
    }

    /// Returns the scheme: `env`, `file` or a registered one.
    pub fn scheme(&self) -> &str {
        &self.scheme
    }

    /// Returns the place within the scheme.
    pub fn place(&self) -> &str {
        &self.place
    }
}

impl fmt::Display for SecretRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{ {}: {} }}", self.scheme, self.place)
    }
}

impl Serialize for SecretRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        BTreeMap::from([(&self.scheme, &self.place)]).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for SecretRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = BTreeMap::<String, String>::deserialize(deserializer)
            .map_err(|_| de::Error::custom("a secret is a reference: { env: NAME } or { file: PATH }"))?;
        let mut entries = map.into_iter();
        match (entries.next(), entries.next()) {
            (Some((scheme, place)), None) => Ok(Self { scheme, place }),
            _ => Err(de::Error::custom("a secret reference has exactly one key: { env: NAME } or { file: PATH }")),
        }
    }
}

#[cfg(feature = "file")]
impl schemars::JsonSchema for SecretRef {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "SecretRef".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "additionalProperties": { "type": "string" },
            "properties": {
                "env": { "type": "string", "description": "The environment variable that holds the secret." },
                "file": { "type": "string", "description": "The file that holds the secret." }
            },
            "description": "A reference to a secret; the secret itself never stands in a pipeline."
        })
    }
}

/// Resolves the references of one scheme.
///
/// # Guarantees
/// Called at every use, never at load; what it returns is masked in all that the run writes.
///
/// # Errors
/// The message names the reference, never the secret.
#[async_trait]
pub trait SecretSource: Send + Sync + 'static {
    /// Reads the secret at `place`.
    async fn read(&self, place: &str) -> Result<SecretString, StepError>;
}

struct Environment;

#[async_trait]
impl SecretSource for Environment {
    async fn read(&self, place: &str) -> Result<SecretString, StepError> {
        std::env::var(place).map(SecretString::from).map_err(|error| {
            StepError::permanent(format!("the secret {{ env: {place} }} cannot be read"))
                .with_cause(&error)
                .with_hint(format!("set the environment variable {place} for the process that runs the upgrade"))
        })
    }
}

struct Files {
    base: PathBuf,
}

#[async_trait]
impl SecretSource for Files {
    async fn read(&self, place: &str) -> Result<SecretString, StepError> {
        match tokio::fs::read_to_string(self.base.join(place)).await {
            Ok(text) => {
                let end = text.trim_end_matches(['\r', '\n']).len();
                Ok(SecretString::from(text[..end].to_owned()))
            }
            Err(error) => Err(StepError::permanent(format!("the secret {{ file: {place} }} cannot be read"))
                .with_cause(&error)
                .with_hint("check that the file is there and readable for the account that runs the upgrade")),
        }
    }
}

/// Resolves secret references and remembers what it resolved, so that it can be masked.
#[derive(Clone)]
pub struct Secrets {
    sources: BTreeMap<String, Arc<dyn SecretSource>>,
    known: Arc<Mutex<Vec<SecretString>>>,
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Secrets").field("schemes", &self.sources.keys()).finish_non_exhaustive()
    }
}

impl Default for Secrets {
    fn default() -> Self {
        Self::new(Path::new("."))
    }
}

impl Secrets {
    /// Resolves `env` and `file`; relative files are looked up in `base`.
    pub fn new(base: &Path) -> Self {
        let mut sources: BTreeMap<String, Arc<dyn SecretSource>> = BTreeMap::new();
        sources.insert("env".into(), Arc::new(Environment));
        sources.insert("file".into(), Arc::new(Files { base: base.to_path_buf() }));
        Self { sources, known: Arc::default() }
    }

    /// Adds a scheme.
    #[must_use]
    pub fn with_source(mut self, scheme: impl Into<String>, source: Arc<dyn SecretSource>) -> Self {
        self.sources.insert(scheme.into(), source);
        self
    }

    /// Looks relative files up in another directory.
    #[must_use]
    pub(crate) fn based_in(mut self, base: &Path) -> Self {
        self.sources.insert("file".into(), Arc::new(Files { base: base.to_path_buf() }));
        self
    }

    /// Reads a secret and remembers it for masking.
    ///
    /// # Errors
    /// The scheme is not registered, or its source cannot read the place.
    pub async fn resolve(&self, reference: &SecretRef) -> Result<SecretString, StepError> {
        let source = self.sources.get(&reference.scheme).ok_or_else(|| {
            let known: Vec<_> = self.sources.keys().map(String::as_str).collect();
            StepError::permanent(format!("the secret {reference} is of an unknown scheme"))
                .with_hint(format!("known schemes: {}", known.join(", ")))
        })?;
        let secret = source.read(&reference.place).await?;
        self.remember(&secret);
        Ok(secret)
    }

    /// Masks the variables of the environment that `definition` refers to, before anything resolves
    /// them: every program that a step runs inherits them, and may print them.
    pub(crate) fn expect(&self, definition: &Value) {
        match definition {
            Value::Array(items) => items.iter().for_each(|item| self.expect(item)),
            Value::Object(map) => {
                let mut entries = map.iter();
                if let (Some((scheme, Value::String(name))), None) = (entries.next(), entries.next())
                    && scheme == "env"
                    && let Ok(value) = std::env::var(name)
                {
                    self.remember(&SecretString::from(value));
                }
                map.values().for_each(|item| self.expect(item));
            }
            _ => {}
        }
    }

    /// Masks `secret` from now on, wherever it came from; of one of several lines, each line as well.
    pub fn remember(&self, secret: &SecretString) {
        let mut lines = secret.expose_secret().lines();
        if lines.nth(1).is_some() {
            // What reads it, a key for example, may well show it line by line.
            for line in secret.expose_secret().lines().map(str::trim).filter(|line| line.len() >= 8) {
                self.remember(&SecretString::from(line));
            }
        }
        // Shorter ones would mask half of every text and protect nothing.
        if secret.expose_secret().len() < 4 {
            return;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if !known.iter().any(|k| k.expose_secret() == secret.expose_secret()) {
            known.push(secret.clone());
            // One that is part of another must not be masked first: the rest would show.
            known.sort_by_key(|known| std::cmp::Reverse(known.expose_secret().len()));
        }
    }

    /// Replaces every secret that was resolved so far.
    pub fn mask(&self, text: &str) -> String {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut masked = text.to_owned();
        for secret in known.iter() {
            if masked.contains(secret.expose_secret()) {
                masked = masked.replace(secret.expose_secret(), "•••");
            }
        }
        masked
    }

    /// Tells whether any text in `value` holds a secret that was resolved so far.
    pub fn are_in(&self, value: &Value) -> bool {
        match value {
            Value::String(text) => self.holds_secret(text),
            Value::Array(items) => items.iter().any(|item| self.are_in(item)),
            Value::Object(map) => map.iter().any(|(name, item)| self.holds_secret(name) || self.are_in(item)),
            Value::Number(number) => self.holds_secret(&number.to_string()),
            Value::Null | Value::Bool(_) => false,
        }
    }

    /// Tells whether a text holds a secret that was resolved so far.
    pub fn holds_secret(&self, text: &str) -> bool {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.iter().any(|secret| text.contains(secret.expose_secret()))
    }
}
