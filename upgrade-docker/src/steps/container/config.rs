//! What `docker.container` is told.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use secrecy::ExposeSecret as _;
use serde::{Deserialize, Serialize};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::BuildError;
use upgrade_core::text_or_secret::TextOrSecret;

use crate::handover::Handover;
use crate::health::Gate;
use crate::images::Pull;
use crate::reference::ImageReference;
use crate::specification::{Changes, Mount, Port};

/// Configures `docker.container`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ContainerConfig {
    /// The engine. Default: the one that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The name of the container.
    pub name: String,
    /// The image of the next container. Default: the one that it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageReference>,
    /// When the image is pulled.
    #[serde(default)]
    pub pull: Pull,
    /// The platform of the image: `linux/arm64`. Default: the engine's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Variables of the environment: texts or references to secrets; with `null`, one is removed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, Option<TextOrSecret>>,
    /// Labels; with `null`, one is removed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, Option<String>>,
    /// The command and its arguments, in place of those there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// The ports to publish, in place of those that are: `8080:80`, `127.0.0.1:53:53/udp`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<String>>,
    /// Mounts to add, or to put in the place of one at the same path: `data:/var/lib/data:ro`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<String>,
    /// When the next container counts as serving.
    #[serde(default)]
    pub health: Gate,
    /// How the run goes on if it is inside this container itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handover: Option<Handover>,
}

impl ContainerConfig {
    /// Leaves a container as it is, but for an image.
    pub fn new(name: impl Into<String>, image: Option<ImageReference>) -> Self {
        Self {
            target: None,
            name: name.into(),
            image,
            pull: Pull::default(),
            platform: None,
            env: BTreeMap::new(),
            labels: BTreeMap::new(),
            command: None,
            ports: None,
            mounts: Vec::new(),
            health: Gate::default(),
            handover: None,
        }
    }

    pub(super) fn validate(&self) -> Result<(), BuildError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
        if self.name.len() < 2 || !self.name.bytes().all(plain) || !self.name.as_bytes()[0].is_ascii_alphanumeric() {
            return Err(BuildError::new(format!("`{}` is not the name of a container", self.name.escape_debug()))
                .at("name")
                .with_hint("`docker ps` lists them in its last column"));
        }
        for name in self.env.keys() {
            if name.is_empty() || name.contains(['=', '\0']) {
                return Err(BuildError::new("a variable's name is not empty and holds no `=`").at("env"));
            }
        }
        self.ports()?;
        self.mounts()?;
        self.handover.as_ref().map_or(Ok(()), Handover::validate)?;
        self.health.validate()
    }

    fn ports(&self) -> Result<Option<Vec<Port>>, BuildError> {
        let Some(ports) = &self.ports else { return Ok(None) };
        let read = |(number, text): (usize, &String)| {
            text.parse().map_err(|error: &str| BuildError::new(error).at(format!("ports.{number}")))
        };
        ports.iter().enumerate().map(read).collect::<Result<_, _>>().map(Some)
    }

    fn mounts(&self) -> Result<Vec<Mount>, BuildError> {
        let read = |(number, text): (usize, &String)| {
            text.parse().map_err(|error: &str| BuildError::new(error).at(format!("mounts.{number}")))
        };
        self.mounts.iter().enumerate().map(read).collect()
    }

    /// Reads the secrets, and says what is to be different.
    pub(super) async fn changes(&self, cx: &Context, image: &str) -> Result<Changes, StepError> {
        let mut env = BTreeMap::new();
        for (name, value) in &self.env {
            let value = match value {
                Some(value) => Some(value.resolve(cx).await?.expose_secret().to_owned()),
                None => None,
            };
            env.insert(name.clone(), value);
        }
        let wrong = |error: BuildError| StepError::permanent(error.to_string());
        Ok(Changes {
            image: Some(image.to_owned()),
            env,
            labels: self.labels.clone(),
            command: self.command.clone(),
            ports: self.ports().map_err(wrong)?,
            mounts: self.mounts().map_err(wrong)?,
        })
    }
}
