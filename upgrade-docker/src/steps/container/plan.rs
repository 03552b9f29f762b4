//! What `prepare` finds, and what it refuses.

use std::collections::BTreeSet;

use bollard::Docker;
use serde_json::Value;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::sealed::SealedRef;
use upgrade_core::step::{Change, Effect, Prepared};

use super::{Container, ContainerOutput, ContainerUndo, Found, Intended, Restart};
use crate::error::DockerError;
use crate::images::{self, id_of};
use crate::moved_tag::MovedTag;
use crate::reference::ImageReference;
use crate::specification::{Changes, Sources, config_of, specify};
use crate::verbatim;

impl Container {
    pub(super) async fn plan(&self, cx: &Context) -> Result<Prepared<ContainerUndo, ContainerOutput>, StepError> {
        let name = &self.config.name;
        let client = self.engine.connect(cx).await?;
        let found = verbatim::inspect(&client, name).await?;
        let found = found.filter(|found| text(&found["Name"]).trim_start_matches('/') == name);
        let found = found.ok_or_else(|| {
            StepError::permanent(format!("there is no container {name}")).with_hint(
                "start it once as it is to be (`docker run`), or correct `name`: `docker ps --all` lists them",
            )
        })?;
        refuse(name, &found)?;
        self.must_outlive(&client, text(&found["Id"])).await?;
        let image_id = text(&found["Image"]).to_owned();
        let old_image = images::local(&client, &image_id).await?.ok_or_else(|| {
            StepError::permanent(format!("the image of container {name} is gone: nobody can tell what came from it"))
                .with_hint(format!("pull it again: `docker pull {}`", text(&found["Config"]["Image"])))
        })?;
        let image =
            self.config.image.as_ref().map_or_else(|| text(&found["Config"]["Image"]).into(), |i| i.to_string());

        let mut tag = None;
        let mut pulled = false;
        let new_image = match &self.config.image {
            None => old_image.clone(),
            Some(reference) => {
                let before = images::local(&client, &reference.to_string()).await?;
                let obtained = match before.clone() {
                    Some(here) if cx.is_dry_run() => here,
                    None if cx.is_dry_run() => return Ok(self.later(cx, &found, reference)),
                    _ => self.obtain(cx, &client, reference, &mut pulled).await?,
                };
                let before = before.map(|image| id_of(&image)).transpose()?;
                if reference.digest().is_none() && before.as_deref() != Some(&id_of(&obtained)?) {
                    tag = Some(MovedTag { reference: reference.clone(), found: before });
                }
                obtained
            }
        };
        let new_id = id_of(&new_image)?;

        let inherited = inherited(&client, &found).await?;
        let (old_config, new_config) = (config_of(&old_image), config_of(&new_image));
        let sources =
            Sources { container: &found, old_image: &old_config, new_image: &old_config, inherited: &inherited };
        let before = specify(sources, &Changes::default());
        let changes = self.config.changes(cx, &image).await?;
        let after = specify(Sources { new_image: &new_config, ..sources }, &changes);
        let differences = before.differences(&after);
        if image_id == new_id && differences.is_empty() {
            let output = ContainerOutput { id: text(&found["Id"]).into(), image, image_id };
            return Ok(Prepared::unchanged(output, "the container is of that image and has those settings"));
        }

        let contents = found.to_string().into_bytes();
        let inspect = if cx.is_dry_run() { SealedRef::of(&contents) } else { cx.seal(&contents).await? };
        let change = change(&found, &image, image_id != new_id, &differences);
        let undo = ContainerUndo {
            name: name.clone(),
            found: Found {
                id: text(&found["Id"]).into(),
                image: text(&found["Config"]["Image"]).into(),
                image_id,
                running: found["State"]["Running"] == Value::Bool(true),
                restart: restart_of(&found),
                inspect,
            },
            intended: Intended { image, image_id: new_id, pulled },
            tag,
        };
        Ok(Prepared::change(undo, [change]))
    }

    /// Obtains the image while everything runs on, and notes whether that brought it to the engine.
    async fn obtain(
        &self,
        cx: &Context,
        client: &Docker,
        reference: &ImageReference,
        pulled: &mut bool,
    ) -> Result<bollard::models::ImageInspect, StepError> {
        let known: BTreeSet<String> = client
            .list_images(Some(bollard::query_parameters::ListImagesOptionsBuilder::new().all(true).build()))
            .await
            .map_err(DockerError::from)?
            .into_iter()
            .map(|image| image.id)
            .collect();
        let platform = self.config.platform.as_deref();
        let image = images::obtain_aside(&self.engine, client, cx, reference, platform, self.config.pull).await?;
        *pulled = !known.contains(&id_of(&image)?);
        Ok(image)
    }

    /// Answers a dry run before the image is there.
    fn later(
        &self,
        cx: &Context,
        found: &Value,
        reference: &ImageReference,
    ) -> Prepared<ContainerUndo, ContainerOutput> {
        let contents = found.to_string().into_bytes();
        debug_assert!(cx.is_dry_run());
        let undo = ContainerUndo {
            name: self.config.name.clone(),
            found: Found {
                id: text(&found["Id"]).into(),
                image: text(&found["Config"]["Image"]).into(),
                image_id: text(&found["Image"]).into(),
                running: found["State"]["Running"] == Value::Bool(true),
                restart: restart_of(found),
                inspect: SealedRef::of(&contents),
            },
            intended: Intended { image: reference.to_string(), image_id: String::new(), pulled: true },
            tag: None,
        };
        Prepared::change(undo, [change(found, &reference.to_string(), true, &["known once it is pulled".into()])])
    }
}

/// Names the volumes of the containers that this one takes volumes from.
pub(super) async fn inherited(client: &Docker, container: &Value) -> Result<BTreeSet<String>, DockerError> {
    let mut volumes = BTreeSet::new();
    let from = container["HostConfig"]["VolumesFrom"].as_array();
    for other in from.into_iter().flatten().filter_map(Value::as_str) {
        let other = other.split(':').next().unwrap_or(other);
        let other = verbatim::inspect(client, other).await?.unwrap_or_default();
        let mounts = other["Mounts"].as_array();
        volumes.extend(mounts.into_iter().flatten().filter_map(|mount| mount["Name"].as_str()).map(str::to_owned));
    }
    Ok(volumes)
}

fn change(found: &Value, image: &str, other_image: bool, differences: &[String]) -> Change {
    let name = text(&found["Name"]).trim_start_matches('/');
    let mut said = Vec::new();
    if other_image {
        said.push(format!("image {} → {image}", text(&found["Config"]["Image"])));
    }
    said.extend_from_slice(differences);
    if let Some(project) = found["Config"]["Labels"]["com.docker.compose.project"].as_str() {
        said.push(format!("Compose project {project} does not know of it (`docker.compose` would tell it)"));
    }
    Change::new(Effect::Modify, format!("container {name}"))
        .with_summary(said.join("; "))
        .undo_loses("what the new container wrote to its own file system, outside of volumes")
}

/// Refuses what cannot be replaced and put back.
fn refuse(name: &str, found: &Value) -> Result<(), StepError> {
    let wrong = |what: &str, hint: &str| Err(StepError::permanent(format!("container {name} {what}")).with_hint(hint));
    if found["HostConfig"]["AutoRemove"] == Value::Bool(true) {
        return wrong(
            "is removed by the engine when it stops (`--rm`): there would be no way back",
            "start it without `--rm`, with a restart policy if it is to last",
        );
    }
    if found["Config"]["Labels"].get("com.docker.swarm.task.id").is_some() {
        return wrong("belongs to a Swarm service, which would start another one", "`docker service update --image`");
    }
    if found["State"]["Paused"] == Value::Bool(true) {
        return wrong("is paused", "`docker unpause` it, or stop it, then run again");
    }
    Ok(())
}

fn restart_of(found: &Value) -> Restart {
    let policy = &found["HostConfig"]["RestartPolicy"];
    let name = match text(&policy["Name"]) {
        "" => "no",
        name => name,
    };
    Restart { name: name.into(), maximum_retry_count: policy["MaximumRetryCount"].as_i64().unwrap_or_default() }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
