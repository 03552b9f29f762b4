//! Values of rules: spelled out, or referred to where they are secret.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::Value;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::secret::{ExposeSecret, SecretRef};

/// Holds a value as the pipeline gives it.
///
/// An object with `env`, `file` or `secret` as its only key is a reference to a secret; set such
/// an object, if it is meant as it stands, key by key.
#[derive(Debug, Clone, PartialEq)]
pub enum ConfigValue {
    /// The value itself.
    Literal(Value),
    /// A secret, put in as a text.
    Secret(SecretRef),
}

impl ConfigValue {
    /// Returns the value; a secret is resolved.
    pub(crate) async fn resolve(&self, cx: &Context) -> Result<Value, StepError> {
        match self {
            ConfigValue::Literal(value) => Ok(value.clone()),
            ConfigValue::Secret(reference) => Ok(Value::String(cx.secret(reference).await?.expose_secret().to_owned())),
        }
    }
}

impl Serialize for ConfigValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            ConfigValue::Literal(value) => value.serialize(serializer),
            ConfigValue::Secret(reference) if matches!(reference.scheme(), "env" | "file") => {
                reference.serialize(serializer)
            }
            ConfigValue::Secret(reference) => {
                std::collections::BTreeMap::from([("secret", reference)]).serialize(serializer)
            }
        }
    }
}

impl<'de> Deserialize<'de> for ConfigValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let value = Value::deserialize(deserializer)?;
        let only = value.as_object().filter(|object| object.len() == 1).and_then(|object| object.iter().next());
        let reference = match only {
            Some((key, Value::String(_))) if key == "env" || key == "file" => Some(value.clone()),
            Some((key, inner)) if key == "secret" => Some(inner.clone()),
            _ => None,
        };
        match reference {
            Some(reference) => serde_json::from_value(reference).map(ConfigValue::Secret).map_err(de::Error::custom),
            None => Ok(ConfigValue::Literal(value)),
        }
    }
}

impl JsonSchema for ConfigValue {
    fn schema_name() -> Cow<'static, str> {
        "ConfigValue".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "description": "Any value, or a reference to a secret: { env: NAME }, { file: PATH }." })
    }
}
