//! Modes and owners as a pipeline spells them.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use upgrade_core::error::StepError;

use crate::error::{blocking, io_error};

/// Holds permission bits, spelled in octal: `"0640"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode(u32);

impl Mode {
    /// Takes permission bits; those beyond 07777 are dropped.
    pub fn new(bits: u32) -> Self {
        Self(bits & 0o7777)
    }

    /// Returns the permission bits.
    pub fn bits(self) -> u32 {
        self.0
    }
}

impl Serialize for Mode {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:04o}", self.0))
    }
}

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A number is refused: YAML readers disagree whether 0640 is octal.
        let text = String::deserialize(deserializer)
            .map_err(|_| de::Error::custom("a mode is a text in octal, in quotes: \"0640\""))?;
        match u32::from_str_radix(text.trim_start_matches("0o"), 8) {
            Ok(bits) if bits <= 0o7777 => Ok(Self(bits)),
            _ => Err(de::Error::custom(format!("`{text}` is not a mode in octal, such as \"0640\""))),
        }
    }
}

impl JsonSchema for Mode {
    fn schema_name() -> Cow<'static, str> {
        "Mode".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^(0o)?[0-7]{1,5}$", "description": "Permissions in octal." })
    }
}

/// Finds the ids of an owner `user:group`; what it leaves out is as found, else the process's.
pub(crate) async fn resolve(owner: Option<String>, found: Option<(u32, u32)>) -> Result<(u32, u32), StepError> {
    let (user, group) =
        found.unwrap_or_else(|| (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()));
    let Some(owner) = owner else { return Ok((user, group)) };
    blocking(move || {
        let (user_name, group_name) = owner.split_once(':').unwrap_or((&owner, ""));
        let user = if user_name.is_empty() { user } else { id("/etc/passwd", "user", user_name)? };
        let group = if group_name.is_empty() { group } else { id("/etc/group", "group", group_name)? };
        Ok((user, group))
    })
    .await
}

fn id(database: &str, what: &str, name: &str) -> Result<u32, StepError> {
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    let text =
        std::fs::read_to_string(database).map_err(|error| io_error(format!("{database} cannot be read"), &error))?;
    text.lines()
        .filter_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
        })
        .next()
        .ok_or_else(|| {
            StepError::permanent(format!("there is no {what} `{name}` in {database}"))
                .with_hint(format!("create the {what}, or give its numeric id (as `id` or `getent` tell it)"))
        })
}
