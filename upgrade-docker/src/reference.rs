//! Names of images, as `docker pull` reads them.
//!
//! The grammar and its defaults are those of the Distribution project's `reference` package: the
//! first part is a registry if it holds a dot or a colon or is `localhost`, else Docker Hub is meant.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

const HUB: &str = "docker.io";

/// Names an image: `registry/repository:tag@digest`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageReference {
    registry: Option<String>,
    repository: String,
    tag: Option<String>,
    digest: Option<String>,
}

/// Says why a text is not the name of an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not the name of an image: {reason}")]
pub struct ReferenceError {
    text: String,
    reason: &'static str,
}

impl ImageReference {
    /// Returns the host of the registry, as credentials are filed under it.
    pub fn registry(&self) -> &str {
        self.registry.as_deref().unwrap_or(HUB)
    }

    /// Returns what the engine calls the image without tag and digest.
    pub fn name(&self) -> String {
        match &self.registry {
            Some(registry) => format!("{registry}/{}", self.repository),
            None => self.repository.clone(),
        }
    }

    /// Returns the tag; `latest` where neither a tag nor a digest is written.
    pub fn tag(&self) -> Option<&str> {
        match (&self.tag, &self.digest) {
            (Some(tag), _) => Some(tag),
            (None, Some(_)) => None,
            (None, None) => Some("latest"),
        }
    }

    /// Returns the digest, if the image is pinned by one: `sha256:…`.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// Returns the same repository pinned by a digest.
    #[must_use]
    pub fn at_digest(&self, digest: &str) -> Self {
        Self { tag: None, digest: Some(digest.to_owned()), ..self.clone() }
    }

    /// Returns the same repository with another tag.
    #[must_use]
    pub fn with_tag(&self, tag: &str) -> Self {
        Self { tag: Some(tag.to_owned()), digest: None, ..self.clone() }
    }
}

impl FromStr for ImageReference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let wrong = |reason| ReferenceError { text: text.escape_debug().take(200).collect(), reason };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        if let Some(digest) = digest {
            let hex = digest.strip_prefix("sha256:").ok_or_else(|| wrong("a digest is written sha256:…"))?;
            if hex.len() != 64 || !hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
                return Err(wrong("a sha256 digest has 64 hexadecimal digits, in lower case"));
            }
        }
        let last = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match rest[last..].find(':') {
            Some(colon) => (&rest[..last + colon], Some(&rest[last + colon + 1..])),
            None => (rest, None),
        };
        if let Some(tag) = tag {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
            let first = tag.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
            if !first || tag.len() > 128 || !tag.bytes().all(plain) {
                return Err(wrong("a tag has letters, digits, `_`, `.` and `-`, at most 128"));
            }
        }
        let (registry, repository) = match name.split_once('/') {
            Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (Some(first), rest),
            _ => (None, name),
        };
        let part = |part: &str| {
            !part.is_empty()
                && part.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-'))
                && part.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric())
                && part.bytes().last().is_some_and(|byte| byte.is_ascii_alphanumeric())
        };
        if repository.is_empty() || !repository.split('/').all(part) {
            return Err(wrong("a repository has lower-case letters, digits, and `.`, `_`, `-` within"));
        }
        let host = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':' | b'[' | b']');
        if registry.is_some_and(|registry| registry.is_empty() || !registry.bytes().all(host)) {
            return Err(wrong("its registry is not a host with a port"));
        }
        Ok(Self {
            registry: registry.filter(|registry| *registry != HUB).map(str::to_owned),
            repository: repository.to_owned(),
            tag: tag.map(str::to_owned),
            digest: digest.map(str::to_owned),
        })
    }
}

impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())?;
        if let Some(tag) = self.tag() {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl TryFrom<String> for ImageReference {
    type Error = ReferenceError;
    fn try_from(text: String) -> Result<Self, ReferenceError> {
        text.parse()
    }
}

impl From<ImageReference> for String {
    fn from(reference: ImageReference) -> Self {
        reference.to_string()
    }
}

impl schemars::JsonSchema for ImageReference {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "ImageReference".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "description": "an image: registry/repository:tag@digest" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> ImageReference {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_is_read_as_docker_reads_it() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, registry, name, tag) in [
            ("nginx", "docker.io", "nginx", Some("latest")),
            ("docker.io/library/nginx:1", "docker.io", "library/nginx", Some("1")),
            ("shop/web:2.0", "docker.io", "shop/web", Some("2.0")),
            ("localhost/web", "localhost", "localhost/web", Some("latest")),
            ("127.0.0.1:5000/web:1", "127.0.0.1:5000", "127.0.0.1:5000/web", Some("1")),
            ("r.example.com/a/b/c", "r.example.com", "r.example.com/a/b/c", Some("latest")),
        ] {
            let found = read(text);
            assert_eq!((found.registry(), found.name().as_str(), found.tag()), (registry, name, tag), "{text}");
            assert_eq!(read(&found.to_string()), read(&format!("{name}:{}", tag.unwrap_or_default())), "{text}");
        }
        let pinned = read(&format!("web@{digest}"));
        assert_eq!((pinned.tag(), pinned.digest()), (None, Some(digest.as_str())));
        assert_eq!(pinned.to_string(), format!("web@{digest}"));
        assert_eq!(read("web:1").at_digest(&digest), pinned);
    }

    #[test]
    fn what_is_no_name_says_why() {
        for text in
            ["", "Web", "web:", "web:a b", "web@sha256:1", "web@md5:x", "/web", "web/", "r.example.com/", "-x", "we b"]
        {
            let error = text.parse::<ImageReference>().unwrap_err();
            assert!(error.to_string().contains("is not the name of an image: "), "{error}");
        }
    }
}
