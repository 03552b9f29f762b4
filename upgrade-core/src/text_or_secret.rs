//! A text of a configuration that may be a reference to a secret instead.

use std::fmt;

use crate::context::Context;
use crate::error::StepError;
use crate::secret::{SecretRef, SecretString};
use serde::de::{self, MapAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Deserializer, Serialize};

/// Holds a plain text, or refers to a secret that is read when it is used.
///
/// Written `plain`, `{ env: TOKEN }` or `{ file: /run/secrets/token }`; a number or a boolean is
/// taken for the text it is written as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum TextOrSecret {
    /// The text itself: part of the definition, shown wherever the configuration is.
    Text(String),
    /// The reference alone is ever shown.
    Secret(SecretRef),
}

impl TextOrSecret {
    /// Returns the text, or reads the secret.
    ///
    /// # Errors
    /// The reference cannot be resolved.
    pub async fn resolve(&self, cx: &Context) -> Result<SecretString, StepError> {
        match self {
            Self::Text(text) => Ok(SecretString::from(text.clone())),
            Self::Secret(reference) => cx.secret(reference).await,
        }
    }
}

impl From<&str> for TextOrSecret {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for TextOrSecret {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<SecretRef> for TextOrSecret {
    fn from(reference: SecretRef) -> Self {
        Self::Secret(reference)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = TextOrSecret;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, or a secret as { env: NAME } or { file: PATH }")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<TextOrSecret, E> {
        Ok(TextOrSecret::Text(text.to_owned()))
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<TextOrSecret, E> {
        Ok(TextOrSecret::Text(value.to_string()))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<TextOrSecret, E> {
        Ok(TextOrSecret::Text(value.to_string()))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<TextOrSecret, E> {
        Ok(TextOrSecret::Text(value.to_string()))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<TextOrSecret, E> {
        Ok(TextOrSecret::Text(value.to_string()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<TextOrSecret, A::Error> {
        SecretRef::deserialize(MapAccessDeserializer::new(map)).map(TextOrSecret::Secret)
    }
}

impl<'de> Deserialize<'de> for TextOrSecret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextVisitor)
    }
}

#[cfg(feature = "file")]
impl schemars::JsonSchema for TextOrSecret {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "TextOrSecret".into()
    }

    fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
        let secret = generator.subschema_for::<SecretRef>();
        schemars::json_schema!({
            "anyOf": [{ "type": ["string", "number", "boolean"] }, secret],
            "description": "A text, or a reference to a secret."
        })
    }
}
