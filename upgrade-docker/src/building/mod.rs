//! Images built by an engine from a directory of this machine.

mod bases;
mod context;
mod ignored;
mod output;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Duration;

use bollard::query_parameters::BuildImageOptionsBuilder;
use bollard::{Docker, body_try_stream};
use futures_util::StreamExt as _;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use upgrade_core::context::{Context, blocking};
use upgrade_core::error::StepError;
use upgrade_core::registry::BuildError;
use upgrade_core::secret::ExposeSecret as _;
use upgrade_core::text_or_secret::TextOrSecret;

use crate::error::{Doing, cancelled};
use crate::images;
use crate::reference::ImageReference;
use crate::streams::{self, joined};
use crate::target::Engine;
pub(crate) use context::{Directory, Sent};
use output::Output;

/// What a build may take; it is ended by cancelling, not by the clock.
const BUILDING: Duration = Duration::from_secs(7 * 86_400);

/// Says from what an image is built.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BuildConfig {
    /// The directory that is sent to the engine, without what its `.dockerignore` names.
    pub context: PathBuf,
    /// The Dockerfile, from `context` on. Default: `Dockerfile`.
    #[serde(default = "dockerfile")]
    pub dockerfile: String,
    /// Build arguments: texts, or references to secrets. What a build is given stands in the image's
    /// history for whoever has the image.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub args: BTreeMap<String, TextOrSecret>,
    /// Labels of the image.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The stage of the Dockerfile that is built. Default: the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// The network of what `RUN` starts: `none`, `host`, or the name of one. Default: the engine's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// Asks the registries for newer images of those that the Dockerfile begins with.
    #[serde(default)]
    pub pull: bool,
    /// Builds everything anew, whatever the engine has kept of earlier builds.
    #[serde(default)]
    pub no_cache: bool,
}

fn dockerfile() -> String {
    "Dockerfile".to_owned()
}

impl BuildConfig {
    pub(crate) fn validate(&self) -> Result<(), BuildError> {
        let outside = self.dockerfile.starts_with('/') || self.dockerfile.split('/').any(|part| part == "..");
        if self.dockerfile.is_empty() || outside {
            return Err(BuildError::new("the Dockerfile is named from the directory `context` on")
                .at("build.dockerfile")
                .with_hint("put it into that directory, or name a directory above as `context`"));
        }
        Ok(())
    }

    /// Lists the images that the Dockerfile begins with, as far as its text tells.
    fn bases(&self, dockerfile: &str) -> Vec<String> {
        let texts = self.args.iter().filter_map(|(name, value)| match value {
            TextOrSecret::Text(text) => Some((name.clone(), text.clone())),
            TextOrSecret::Secret(_) => None,
        });
        bases::of(dockerfile, &texts.collect()).into_iter().collect()
    }
}

/// Holds what a build found, which its undo needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Built {
    /// When, by the engine's clock: what is older was not made by this build.
    pub since: String,
    /// The SHA-256 of what the directory held.
    pub context: String,
    /// The images that the Dockerfile begins with, and the ids that they had.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub bases: BTreeMap<String, Option<String>>,
}

impl Built {
    /// Tells whether an image was made after the build was prepared.
    pub(crate) fn is_after(&self, created: Option<&str>) -> bool {
        let at = |text: &str| text.parse::<Timestamp>().ok();
        matches!((at(&self.since), created.and_then(at)), (Some(since), Some(created)) if created >= since)
    }
}

/// Reads what will be built, and what the engine has of it now.
///
/// # Errors
/// The directory or its Dockerfile cannot be read.
pub(crate) async fn prepare(
    client: &Docker,
    cx: &Context,
    config: &BuildConfig,
    directory: &Directory,
) -> Result<(Built, Sent), StepError> {
    let (read, context) = (directory.clone(), cx.clone());
    let (dockerfile, sent) = blocking(move || {
        let dockerfile = read.dockerfile()?;
        read.send(&mut std::io::sink(), &context).map(|sent| (dockerfile, sent))
    })
    .await?;
    let info = client.info().await.doing(|| "asking the engine for its time".into())?;
    let since = info.system_time.filter(|time| time.parse::<Timestamp>().is_ok()).ok_or_else(|| {
        StepError::unknown("the engine does not tell its time")
            .with_hint("what a build makes is known by its time: look at `docker info`")
    })?;
    let mut bases = BTreeMap::new();
    for base in config.bases(&dockerfile) {
        let found = images::local(client, &base).await?.as_ref().map(images::id_of).transpose()?;
        bases.insert(base, found);
    }
    Ok((Built { since, context: sent.sha256.clone(), bases }, sent))
}

/// Builds an image; returns its id.
///
/// The engine gives it no name, so that one that it finishes when nobody waits any more is seen by
/// nobody. Each image that the build makes or pulls is kept under a name of the run's own as soon as
/// the engine says so: by those names its undo knows them.
///
/// # Errors
/// An instruction fails, or the directory is another than was prepared.
pub(crate) async fn build(
    engine: &Engine,
    client: &Docker,
    cx: &Context,
    config: &BuildConfig,
    directory: &Directory,
    platform: Option<&str>,
    built: &Built,
) -> Result<String, StepError> {
    for base in built.bases.values().flatten() {
        // A newer one may take its name; undo gives it back. It may be gone, and is then not given back.
        crate::error::found(images::keep(client, cx, base).await)?;
    }
    let mut arguments = HashMap::new();
    for (name, value) in &config.args {
        arguments.insert(name.clone(), value.resolve(cx).await?.expose_secret().to_owned());
    }
    let mut credentials = HashMap::new();
    let named = built.bases.keys().filter_map(|base| Some(base.parse::<ImageReference>().ok()?.registry().to_owned()));
    for registry in engine.registries().keys().cloned().chain(named) {
        if let Some(login) = engine.credentials(cx, &registry).await? {
            credentials.insert(login.serveraddress.clone().unwrap_or(registry), login);
        }
    }
    let labels = config.labels.clone().into_iter().collect();
    let mut options = BuildImageOptionsBuilder::new()
        .dockerfile(&config.dockerfile)
        .buildargs(&arguments)
        .labels(&labels)
        .nocache(config.no_cache)
        .rm(true)
        .forcerm(true);
    if config.pull {
        options = options.pull("true");
    }
    if let Some(target) = &config.target {
        options = options.target(target);
    }
    if let Some(network) = &config.network {
        options = options.networkmode(network);
    }
    if let Some(platform) = platform {
        options = options.platform(platform);
    }
    let (read, context) = (directory.clone(), cx.clone());
    let (feeding, body) = streams::feed(move |to| read.send(to, &context));
    let body = body_try_stream(body.map(|piece| piece.map(Into::into)));
    let patient = client.clone().with_timeout(BUILDING);
    let mut output = Output::new(client, cx, built);
    let building = async {
        let mut events = patient.build_image(options.build(), Some(credentials), Some(body));
        loop {
            let event = tokio::select! {
                event = events.next() => event,
                () = cx.cancelled().cancelled() => return Err(cancelled()),
            };
            match event {
                Some(Ok(event)) => output.take(&event).await?,
                Some(Err(error)) => return Err(output.failed(error)),
                None => return output.id(),
            }
        }
    };
    let (answered, fed) = tokio::join!(building, feeding);
    if answered.is_err() {
        // What the lost connection ends, or the failure did.
        output.await_end().await;
    }
    let (id, sent) = joined(answered, fed)?;
    images::keep(client, cx, &id).await?;
    if sent.sha256 != built.context {
        return Err(StepError::permanent(format!("{} changed after the step was prepared", directory.root.display()))
            .with_hint("let nothing write there meanwhile, or name it in .dockerignore; then run again"));
    }
    Ok(id)
}
