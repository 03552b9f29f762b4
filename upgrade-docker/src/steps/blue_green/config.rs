//! What a pipeline says about a replacement beside the old container.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use upgrade_core::registry::BuildError;
use upgrade_core::text_or_secret::TextOrSecret;
use upgrade_core::units::Span;

use super::template::Template;
use crate::health::Gate;
use crate::images::Pull;
use crate::reference::ImageReference;

/// Configures `docker.blue_green`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BlueGreenConfig {
    /// The engine. Default: the one that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The name that the colours are made of: `web` stands for `web-blue` and `web-green`, and for
    /// a container `web` that serves before the first upgrade of this kind.
    pub container: String,
    /// The image of the new container.
    pub image: ImageReference,
    /// When the image is pulled.
    #[serde(default)]
    pub pull: Pull,
    /// The platform of the image, where it is not the engine's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Variables of the new container that differ from the old one's; null takes one away.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, Option<TextOrSecret>>,
    /// When the new container counts as serving.
    #[serde(default)]
    pub health: Gate,
    /// How traffic gets to the new container.
    pub switch: Switch,
    /// How long requests that were under way at the switch are given to end.
    #[serde(default = "drain")]
    pub drain: Span,
}

/// Says how traffic gets to the new container.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Switch {
    /// By the names that the engine's networks know it under.
    Alias(AliasSwitch),
    /// By a proxy that reads where to from a file.
    Proxy(ProxySwitch),
}

/// Describes a switch by names on networks.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct AliasSwitch {
    /// The networks whose names are switched. Default: all that the old container is on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<String>,
}

/// Describes a switch by a proxy.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ProxySwitch {
    /// The file of this machine that tells the proxy where the traffic goes.
    pub file: PathBuf,
    /// What is written there: `{{ address }}`, `{{ port }}` and `{{ name }}` are the new container's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// A file that holds the template, in place of `template`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template_file: Option<PathBuf>,
    /// The port that the new container serves on.
    pub port: u16,
    /// The network at whose address the proxy reaches it. Default: the first by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// A program and its arguments that say whether the proxy would take the file: `[nginx, -t]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub check: Vec<String>,
    /// A program and its arguments that let the proxy read the file: `[nginx, -s, reload]`.
    pub reload: Vec<String>,
    /// The container in which `check` and `reload` are run. Default: on this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
}

fn drain() -> Span {
    Span::from_secs(5)
}

impl BlueGreenConfig {
    /// Describes a replacement, everything else by default.
    pub fn new(container: impl Into<String>, image: ImageReference, switch: Switch) -> Self {
        Self {
            target: None,
            container: container.into(),
            image,
            pull: Pull::default(),
            platform: None,
            env: BTreeMap::new(),
            health: Gate::default(),
            switch,
            drain: drain(),
        }
    }

    /// Refuses what contradicts itself.
    pub(super) fn validate(&self) -> Result<(), BuildError> {
        self.health.validate()?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
        let first = self.container.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        if !first || !self.container.bytes().all(plain) {
            return Err(BuildError::new(format!("`{}` is not the name of a container", self.container.escape_debug()))
                .at("container")
                .with_hint("a name has letters, digits, `_`, `.` and `-`, and begins with a letter or digit"));
        }
        if let Some(name) = self.env.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
            return Err(BuildError::new("a variable's name is neither empty nor holds `=`").at(format!("env.{name}")));
        }
        let Switch::Proxy(proxy) = &self.switch else { return Ok(()) };
        match (&proxy.template, &proxy.template_file) {
            (Some(text), None) => Template::new(text.clone()).validate().map_err(|why| {
                BuildError::new(why)
                    .at("switch.proxy.template")
                    .with_hint("for nginx: \"upstream web { server {{ address }}:{{ port }}; }\"")
            })?,
            (None, Some(_)) => {}
            _ => {
                return Err(BuildError::new("name either `template` or `template_file`").at("switch.proxy.template"));
            }
        }
        if proxy.reload.is_empty() {
            return Err(BuildError::new("without a reload the proxy goes on with the old file")
                .at("switch.proxy.reload")
                .with_hint("for nginx: [nginx, -s, reload]"));
        }
        Ok(())
    }
}
