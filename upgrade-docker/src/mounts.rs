//! What a one-off container sees of volumes and directories, written as `docker run -v` takes it.

use std::fmt;
use std::str::FromStr;

use bollard::models::{Mount, MountType};
use serde::{Deserialize, Serialize};

/// Describes a volume or a directory of the engine's machine within a container:
/// `SOURCE:PATH` or `SOURCE:PATH:ro`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MountSpec {
    source: String,
    path: String,
    read_only: bool,
}

/// Says why a text is not a mount.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a mount: {reason}")]
pub struct MountError {
    text: String,
    reason: &'static str,
}

impl MountSpec {
    /// Returns the name of the volume, if it is one and not a directory.
    pub fn volume(&self) -> Option<&str> {
        (!self.source.starts_with('/')).then_some(&*self.source)
    }

    /// Tells whether the container may not write there.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Returns it as the engine takes it: what does not exist is then refused instead of made.
    pub(crate) fn mount(&self) -> Mount {
        Mount {
            target: Some(self.path.clone()),
            source: Some(self.source.clone()),
            typ: Some(if self.volume().is_some() { MountType::VOLUME } else { MountType::BIND }),
            read_only: Some(self.read_only),
            ..Mount::default()
        }
    }
}

impl FromStr for MountSpec {
    type Err = MountError;

    fn from_str(text: &str) -> Result<Self, MountError> {
        let wrong = |reason| MountError { text: text.escape_debug().take(200).collect(), reason };
        let mut parts = text.split(':');
        let (Some(source), Some(path)) = (parts.next(), parts.next()) else {
            return Err(wrong("write it VOLUME:PATH or /DIRECTORY:PATH"));
        };
        let read_only = match (parts.next(), parts.next()) {
            (None, _) | (Some("rw"), None) => false,
            (Some("ro"), None) => true,
            _ => return Err(wrong("only `ro` and `rw` may follow the path")),
        };
        if !path.starts_with('/') {
            return Err(wrong("the path in the container begins with `/`"));
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
        let named = source.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
            && source.bytes().all(plain)
            && source.len() > 1;
        if !source.starts_with('/') && !named {
            return Err(wrong("its source is neither the name of a volume nor a directory that begins with `/`"));
        }
        Ok(Self { source: source.to_owned(), path: path.to_owned(), read_only })
    }
}

impl fmt::Display for MountSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}{}", self.source, self.path, if self.read_only { ":ro" } else { "" })
    }
}

impl TryFrom<String> for MountSpec {
    type Error = MountError;
    fn try_from(text: String) -> Result<Self, MountError> {
        text.parse()
    }
}

impl From<MountSpec> for String {
    fn from(mount: MountSpec) -> Self {
        mount.to_string()
    }
}

impl schemars::JsonSchema for MountSpec {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "MountSpec".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "description": "VOLUME:PATH or /DIRECTORY:PATH, and `:ro`" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_read_and_written() {
        for (text, volume, read_only) in [
            ("data:/data", Some("data"), false),
            ("/srv/x:/x:ro", None, true),
            ("shop_db.1:/var/lib/db", Some("shop_db.1"), false),
        ] {
            let mount: MountSpec = text.parse().unwrap();
            assert_eq!((mount.volume(), mount.is_read_only()), (volume, read_only), "{text}");
            assert_eq!(mount.to_string(), text);
        }
    }

    #[test]
    fn what_is_no_mount_says_why() {
        for text in ["", "data", "data:", "data:x", "./here:/x", ":/x", "data:/x:z", "a b:/x", "data:/x:ro:rw"] {
            let error = text.parse::<MountSpec>().unwrap_err();
            assert!(error.to_string().contains("is not a mount: "), "{error}");
        }
    }
}
