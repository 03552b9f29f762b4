//! What `docker.image` is told: an image's name, and the one source that it comes from.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use upgrade_core::registry::BuildError;

use crate::building::BuildConfig;
use crate::reference::ImageReference;

/// Configures `docker.image`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageConfig {
    /// The engine. Default: the one that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The image that is pulled; with `from`, `build` or `load`, the name that an image is given.
    pub image: ImageReference,
    /// An image of the engine that is given the name, instead of a pull.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<ImageReference>,
    /// A directory that the image is built from, instead of a pull.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub build: Option<BuildConfig>,
    /// An archive that the image is loaded from, instead of a pull.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<LoadConfig>,
    /// The platform. Default: the engine's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// How many images of the repository stay on the engine at commit: the newest, and those that
    /// a container uses. Default: all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<u32>,
}

/// Says from which archive an image is loaded.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadConfig {
    /// The archive: what `docker save` writes, as it is or packed by gzip or zstd.
    pub archive: PathBuf,
    /// The SHA-256 that the file must have, as `sha256sum` prints it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// The name that the image has in the archive, if it holds several. Default: `image`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<ImageReference>,
}

impl ImageConfig {
    /// Tells whether the image is pulled, having no other source.
    pub(super) fn is_pulled(&self) -> bool {
        self.from.is_none() && self.build.is_none() && self.load.is_none()
    }

    pub(super) fn validate(&self) -> Result<(), BuildError> {
        let sources = [("from", self.from.is_some()), ("build", self.build.is_some()), ("load", self.load.is_some())];
        let named: Vec<_> = sources.into_iter().filter(|(_, is)| *is).map(|(key, _)| key).collect();
        if let [_, second, ..] = named[..] {
            return Err(BuildError::new(format!("an image has one source, and {} are named", named.join(" and ")))
                .at(second)
                .with_hint("write a step for each"));
        }
        if !self.is_pulled() && self.image.digest().is_some() {
            return Err(BuildError::new("a digest is no name that an image could be given")
                .at("image")
                .with_hint("write it with a tag: `image: shop/web:current`"));
        }
        if self.from.is_some() && self.platform.is_some() {
            return Err(BuildError::new("nothing is pulled that could be for a platform").at("platform"));
        }
        if self.keep == Some(0) {
            return Err(BuildError::new("the image that is brought stays").at("keep").with_hint("write 1 or more"));
        }
        if let Some(build) = &self.build {
            build.validate()?;
        }
        let digest = self.load.as_ref().and_then(|load| load.sha256.as_deref());
        if digest.is_some_and(|digest| digest.len() != 64 || !digest.bytes().all(|byte| byte.is_ascii_hexdigit())) {
            return Err(BuildError::new("a SHA-256 has 64 hexadecimal digits")
                .at("load.sha256")
                .with_hint("write what `sha256sum ARCHIVE` prints"));
        }
        Ok(())
    }
}
