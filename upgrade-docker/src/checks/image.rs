//! `docker.image`: whether an image is there or could be pulled, and whether it is the right one.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use bollard::Docker;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::{CheckError, Class, StepError};
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

use super::joined;
use crate::error::Doing;
use crate::images::{self, platform_of};
use crate::reference::ImageReference;
use crate::target::Engine;

/// Configures `docker.image`.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ImageCheckConfig {
    /// The engine. Default: the one that the `docker` command would use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The image.
    pub image: ImageReference,
    /// Where it must be.
    #[serde(default)]
    pub place: Place,
    /// The digest that it must have: `sha256:…`, as the registry counts it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The platform that it must be for. Default: the engine's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// How long ago it may have been built; known of an image on the engine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age: Option<Span>,
    /// The labels that it must have; known of an image on the engine.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// Says where an image is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// On the engine, else in the registry.
    #[default]
    Any,
    /// On the engine.
    Engine,
    /// In the registry, which is asked without pulling anything.
    Registry,
}

/// Asks for an image without pulling it.
#[derive(Debug)]
pub struct ImageCheck {
    config: ImageCheckConfig,
    engine: Arc<Engine>,
}

/// What is known of an image.
struct Known {
    here: bool,
    id: Option<String>,
    /// One on the engine may have several, by the repositories that it came from.
    digests: Vec<String>,
    platforms: Vec<String>,
    age: Option<f64>,
    labels: BTreeMap<String, String>,
    size: Option<i64>,
}

impl ImageCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// There is no such target, or keys contradict each other.
    pub fn from_config(config: ImageCheckConfig, cx: &BuildContext) -> Result<Self, BuildError> {
        let engine = Engine::named(config.target.as_deref(), cx)?;
        if let Some(digest) = &config.digest
            && format!("x@{digest}").parse::<ImageReference>().is_err()
        {
            return Err(BuildError::new(format!("`{}` is not a digest", digest.escape_debug()))
                .at("digest")
                .with_hint("write it sha256: and 64 hexadecimal digits (`docker images --digests`)"));
        }
        if config.place == Place::Registry && (config.max_age.is_some() || !config.labels.is_empty()) {
            return Err(BuildError::new("a registry tells neither age nor labels without a pull")
                .at(if config.max_age.is_some() { "max_age" } else { "labels" })
                .with_hint("ask the engine for it, after the pull: `place: engine`"));
        }
        Ok(Self { config, engine })
    }

    async fn on_engine(&self, client: &Docker) -> Result<Option<Known>, StepError> {
        let Some(image) = images::local(client, &self.config.image.to_string()).await? else { return Ok(None) };
        let digest = |name: &String| name.split_once('@').map(|(_, digest)| digest.to_owned());
        let created = image.created.as_ref().and_then(|at| at.to_string().parse::<jiff::Timestamp>().ok());
        let labels = image.config.as_ref().and_then(|config| config.labels.clone()).unwrap_or_default();
        Ok(Some(Known {
            here: true,
            platforms: vec![platform_of(&image)],
            digests: image.repo_digests.iter().flatten().filter_map(digest).collect(),
            age: created.map(|at| jiff::Timestamp::now().duration_since(at).as_secs_f64()),
            labels: labels.into_iter().collect(),
            size: image.size,
            id: image.id,
        }))
    }

    /// Asks the registry; the inner error is its answer that there is no such image.
    async fn in_registry(&self, client: &Docker, cx: &Context) -> Result<Result<Known, StepError>, StepError> {
        let image = &self.config.image;
        let credentials = self.engine.credentials(cx, image.registry()).await?;
        let answer = client.inspect_registry_image(&image.to_string(), credentials).await;
        let answer = match answer.doing(|| format!("asking the registry for image {image}")).map_err(StepError::from) {
            Ok(answer) => answer,
            Err(error) if error.class() == Class::Permanent => return Ok(Err(error)),
            Err(error) => return Err(error),
        };
        let platform = |platform: &bollard::models::OciPlatform| {
            let parts = [&platform.os, &platform.architecture, &platform.variant];
            let parts: Vec<_> = parts.into_iter().flatten().filter(|part| !part.is_empty()).cloned().collect();
            parts.join("/")
        };
        Ok(Ok(Known {
            here: false,
            id: None,
            digests: answer.descriptor.digest.into_iter().collect(),
            platforms: answer.platforms.iter().map(platform).filter(|text| !text.is_empty()).collect(),
            age: None,
            labels: BTreeMap::new(),
            size: None,
        }))
    }

    async fn platform(&self, client: &Docker) -> Result<String, StepError> {
        if let Some(platform) = &self.config.platform {
            return Ok(platform.clone());
        }
        let version = client.version().await.doing(|| "asking the engine for its platform".into())?;
        Ok(format!("{}/{}", version.os.unwrap_or_default(), version.arch.unwrap_or_default()))
    }

    fn faults(&self, known: &Known, platform: &str) -> Vec<String> {
        let (config, mut faults) = (&self.config, Vec::new());
        if let Some(digest) = &config.digest
            && !known.digests.contains(digest)
        {
            let has = joined(&known.digests).unwrap_or_else(|| "none: it was never pushed or pulled".into());
            faults.push(format!("its digest is {has}, not {digest}"));
        }
        let wanted =
            |has: &String| has == platform || has.strip_prefix(platform).is_some_and(|rest| rest.starts_with('/'));
        if !known.platforms.is_empty() && !known.platforms.iter().any(wanted) {
            faults.push(format!("it is for {}, not {platform}", known.platforms.join(", ")));
        }
        if let (Some(most), Some(age)) = (config.max_age, known.age)
            && age > most.0.as_secs_f64()
        {
            let age = Span::from_secs(age.max(0.0) as u64);
            faults.push(format!("it was built {age} ago, {most} is the most"));
        }
        for (name, value) in config.labels.iter().filter(|(name, value)| known.labels.get(*name) != Some(value)) {
            faults.push(match known.labels.get(name) {
                Some(has) => format!("its label {name} is `{has}`, not `{value}`"),
                None => format!("it has no label {name}"),
            });
        }
        faults
    }
}

#[async_trait]
impl Check for ImageCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let (config, image) = (&self.config, &self.config.image);
        let client = self.engine.connect(cx).await?;
        let here = match config.place {
            Place::Registry => None,
            Place::Any | Place::Engine => self.on_engine(&client).await?,
        };
        let known = match (here, config.place) {
            (Some(known), _) => known,
            (None, Place::Engine) => {
                return Ok(Verdict::fail(format!("image {image} is not on the engine"))
                    .with_hint("pull, load or build it there, or correct its name"));
            }
            (None, Place::Any | Place::Registry) => match self.in_registry(&client, cx).await? {
                Ok(known) => known,
                Err(error) => {
                    let verdict = Verdict::fail(format!("image {image} cannot be pulled: {}", error.message()));
                    return Ok(match error.hint() {
                        Some(hint) => verdict.with_hint(hint),
                        None => verdict.with_hint("check its name and tag, and the registry's credentials"),
                    });
                }
            },
        };
        if !known.here && (config.max_age.is_some() || !config.labels.is_empty()) {
            return Ok(Verdict::unknown(format!(
                "image {image} is only in the registry, which tells neither age nor labels"
            ))
            .with_hint("ask after the pull (`place: engine`), or drop `max_age` and `labels`"));
        }
        let faults = self.faults(&known, &self.platform(&client).await?);
        let place = if known.here { "on the engine" } else { "in the registry" };
        let mut verdict = match joined(&faults) {
            Some(faults) => Verdict::fail(format!("image {image} {place}: {faults}"))
                .with_hint("build and push the right one, or correct its name"),
            None => Verdict::pass(format!("image {image} is {place}")),
        };
        verdict = verdict.with_fact("place", if known.here { "engine" } else { "registry" });
        for (name, value) in [
            ("id", known.id),
            ("digest", joined(&known.digests)),
            ("platform", (!known.platforms.is_empty()).then(|| known.platforms.join(", "))),
        ] {
            if let Some(value) = value {
                verdict = verdict.with_fact(name, value);
            }
        }
        for (name, value) in [("age_seconds", known.age), ("size_bytes", known.size.map(|size| size as f64))] {
            if let Some(value) = value {
                verdict = verdict.with_measurement(name, value);
            }
        }
        Ok(verdict)
    }

    fn kind(&self) -> &str {
        "docker.image"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}
