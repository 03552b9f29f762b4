//! Containers that are made to reach what a volume holds: created, never started, and removed.
//!
//! The engine holds a container while an archive is read from it or unpacked into it, so whoever
//! looks at a helper, or removes it, waits until what an earlier process began has ended.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::time::Duration;

use bollard::models::{ContainerCreateBody, HostConfig, Mount, MountType, MountVolumeOptions};
use bollard::query_parameters::{
    ContainerArchiveInfoOptionsBuilder, CreateContainerOptionsBuilder, DownloadFromContainerOptionsBuilder,
    ListContainersOptionsBuilder, UploadToContainerOptionsBuilder,
};
use bollard::{Docker, body_try_stream};
use futures_util::StreamExt as _;
use tokio::sync::mpsc;
use upgrade_core::context::{Context, blocking};
use upgrade_core::error::StepError;

use super::contents::{Contents, survey};
use crate::containers;
use crate::error::{DockerError, Doing, cancelled, found};
use crate::naming::{MARKER, labels};
use crate::streams::{self, GONE, Outgoing};

/// The directory that the engine calls the volume in its archives.
pub(crate) const TOP: &str = "volume";
const ABOVE: &str = "/upgrade";
const PLACE: &str = "/upgrade/volume";
/// Names the volume that a helper is for, so that one that a crash left is found.
const OF_VOLUME: &str = "io.github.upgrade-rs.volume";
/// What an unpacking may take; it is ended by cancelling, not by the clock.
const UNPACKING: Duration = Duration::from_secs(7 * 86_400);

/// Describes a helper: what it is called, of which image, on which volume.
pub(crate) struct Helper<'a> {
    pub(crate) name: &'a str,
    pub(crate) image: &'a str,
    pub(crate) volume: &'a str,
    pub(crate) labels: Vec<(&'a str, &'a str)>,
    /// How the volume is made if it is not there: driver, its options, labels.
    pub(crate) missing: Option<MountVolumeOptions>,
}

impl<'a> Helper<'a> {
    pub(crate) fn new(name: &'a str, image: &'a str, volume: &'a str) -> Self {
        Self { name, image, volume, labels: Vec::new(), missing: None }
    }

    /// Makes the container, or takes the one that the step made earlier; returns its id.
    pub(crate) async fn create(&self, client: &Docker, cx: &Context) -> Result<String, StepError> {
        if let Some(there) = own(client, cx, self.name).await? {
            return Ok(there);
        }
        let mut labels = labels(cx);
        labels.insert(OF_VOLUME.to_owned(), self.volume.to_owned());
        labels.extend(self.labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        let mount = Mount {
            target: Some(PLACE.into()),
            source: Some(self.volume.to_owned()),
            typ: Some(MountType::VOLUME),
            // Without it an empty volume would be filled from the image.
            volume_options: Some(MountVolumeOptions {
                no_copy: Some(true),
                ..self.missing.clone().unwrap_or_default()
            }),
            ..Mount::default()
        };
        let body = ContainerCreateBody {
            image: Some(self.image.to_owned()),
            labels: Some(labels),
            user: Some("0:0".into()),
            // The directory itself cannot be removed while it is a volume's place; all below it can.
            entrypoint: Some(vec!["rm".into()]),
            cmd: Some(vec!["-rf".into(), PLACE.into()]),
            host_config: Some(HostConfig {
                network_mode: Some("none".into()),
                mounts: Some(vec![mount]),
                security_opt: Some(vec!["label=disable".into()]),
                ..HostConfig::default()
            }),
            ..ContainerCreateBody::default()
        };
        let options = CreateContainerOptionsBuilder::new().name(self.name).build();
        let made = client.create_container(Some(options), body).await;
        Ok(made.doing(|| format!("making container {} to reach volume {}", self.name, self.volume))?.id)
    }
}

/// Returns the id of a container of the step's own, if it is there.
pub(crate) async fn own(client: &Docker, cx: &Context, name: &str) -> Result<Option<String>, StepError> {
    let Some(there) = containers::inspect(client, name).await? else { return Ok(None) };
    if label_of(&there, MARKER) == Some(&cx.marker()) {
        return Ok(Some(containers::id_of(&there).to_owned()));
    }
    Err(StepError::permanent(format!("container {name} is there and is not this run's"))
        .with_hint("look at it with `docker inspect` and remove or rename it"))
}

/// Returns a label of a container of the step's own, if both are there.
pub(crate) async fn own_label(
    client: &Docker,
    cx: &Context,
    name: &str,
    label: &str,
) -> Result<Option<String>, StepError> {
    if own(client, cx, name).await?.is_none() {
        return Ok(None);
    }
    let there = containers::inspect(client, name).await?;
    Ok(there.and_then(|there| label_of(&there, label).cloned()))
}

fn label_of<'a>(container: &'a bollard::models::ContainerInspectResponse, label: &str) -> Option<&'a String> {
    container.config.as_ref()?.labels.as_ref()?.get(label)
}

/// Removes a container of the step's own, when nothing is read from it or unpacked into it any more.
pub(crate) async fn remove(client: &Docker, cx: &Context, name: &str) -> Result<(), StepError> {
    match own(client, cx, name).await? {
        // Its image may have brought anonymous volumes of its own.
        Some(id) => Ok(containers::remove(client, &id, name, true).await?),
        None => Ok(()),
    }
}

/// Removes what runs that died before their undo was durable left on a volume. Only for who has
/// the lease on the volume: nobody else works on it then.
pub(crate) async fn clear(client: &Docker, volume: &str, name_ends: &str) -> Result<(), StepError> {
    let filters = HashMap::from([("label".to_owned(), vec![format!("{OF_VOLUME}={volume}")])]);
    let options = ListContainersOptionsBuilder::new().all(true).filters(&filters).build();
    let listed = client.list_containers(Some(options)).await.doing(|| format!("looking for helpers on {volume}"))?;
    for container in listed {
        let names = container.names.unwrap_or_default();
        let read_only = names.iter().any(|name| name.contains(name_ends));
        if let (Some(id), true) = (container.id, read_only) {
            containers::remove(client, &id, &names.join(" "), true).await?;
        }
    }
    Ok(())
}

/// Tells whether a file is in a container; links are not followed.
pub(crate) async fn has(client: &Docker, id: &str, path: &str) -> Result<bool, DockerError> {
    let options = ContainerArchiveInfoOptionsBuilder::new().path(path).build();
    let answer = client.get_container_archive_info(id, Some(options)).await;
    Ok(found(answer.doing(|| format!("looking for {path}")))?.is_some())
}

/// Reads what a helper's volume holds, as a tar, on a thread of its own.
pub(crate) async fn download<T: Send + 'static>(
    client: &Docker,
    cx: &Context,
    id: &str,
    work: impl FnOnce(&mut dyn Read) -> Result<T, StepError> + Send + 'static,
) -> Result<T, StepError> {
    let options = DownloadFromContainerOptionsBuilder::new().path(PLACE).build();
    let stream = client.download_from_container(id, Some(options));
    streams::consume(stream, cx, "reading the volume", work).await
}

/// Reads what a helper's volume holds.
pub(crate) async fn contents(client: &Docker, cx: &Context, id: &str) -> Result<Contents, StepError> {
    let context = cx.clone();
    let reading = download(client, cx, id, move |stream| survey(stream, TOP, &context).map_err(|error| broken(&error)));
    reading.await
}

/// Says why what the engine sent is no whole archive.
pub(crate) fn broken(error: &io::Error) -> StepError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            StepError::transient("the archive of the volume ended early: a file may have changed while it was read")
                .with_hint("let what writes to the volume wait meanwhile: `consumers: pause` or `consumers: stop`")
        }
        _ => StepError::unknown("the engine's archive of the volume cannot be read")
            .with_cause(error)
            .with_hint("look at the engine's log; `upgrade resume` tries again"),
    }
}

/// Unpacks a tar into a helper, below the directory that holds its volume's.
///
/// Returns when the engine has ended with it, whatever came of it.
pub(crate) async fn upload<T: Send + 'static>(
    client: &Docker,
    cx: &Context,
    id: &str,
    work: impl FnOnce(&mut dyn Write) -> Result<T, StepError> + Send + 'static,
) -> Result<T, StepError> {
    let (sender, receiver) = mpsc::channel::<io::Result<Vec<u8>>>(16);
    let working = blocking(move || {
        let mut outgoing = Outgoing::new(sender);
        let done = work(&mut outgoing)?;
        // If the engine has ended, it says why.
        let _ = outgoing.flush();
        Ok(done)
    });
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|piece| (piece.map(Into::into), receiver))
    });
    let patient = client.clone().with_timeout(UNPACKING);
    let options = UploadToContainerOptionsBuilder::new().path(ABOVE).build();
    let sending = patient.upload_to_container(id, Some(options), body_try_stream(stream));
    let (sent, worked) = tokio::join!(unpacked(&patient, cx, id, sending), working);
    match sent {
        // What could not be written ended the archive early, which the engine then complains about.
        Err(error) => Err(worked.err().filter(|worked| worked.message() != GONE).unwrap_or(error)),
        Ok(()) => worked,
    }
}

/// Copies what one helper's volume holds into another's.
pub(crate) async fn copy(client: &Docker, cx: &Context, from: &str, to: &str) -> Result<(), StepError> {
    let options = DownloadFromContainerOptionsBuilder::new().path(PLACE).build();
    let (client_of_stream, from, context) = (client.clone(), from.to_owned(), cx.clone());
    let (sender, receiver) = mpsc::channel(16);
    let reading = async move {
        let mut stream = std::pin::pin!(client_of_stream.download_from_container(&from, Some(options)));
        let mut done = 0;
        while let Some(piece) = stream.next().await {
            let piece = match piece.doing(|| "reading the volume".to_owned()) {
                Ok(piece) => piece,
                Err(error) => {
                    // An end without it would look like the archive's own.
                    let _ = sender.send(Err(io::Error::other("the archive ended early"))).await;
                    return Err(StepError::from(error));
                }
            };
            done += piece.len() as u64;
            context.progress(done, None, "copying what the volume holds");
            if sender.send(Ok(piece)).await.is_err() {
                break;
            }
        }
        Ok(())
    };
    let stream = futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|piece| (piece, receiver))
    });
    let patient = client.clone().with_timeout(UNPACKING);
    let options = UploadToContainerOptionsBuilder::new().path(ABOVE).build();
    let sending = patient.upload_to_container(to, Some(options), body_try_stream(stream));
    let (sent, read) = tokio::join!(unpacked(&patient, cx, to, sending), reading);
    read.and(sent)
}

/// Awaits an unpacking; after one that failed or was cancelled, until the engine has ended with it.
async fn unpacked(
    patient: &Docker,
    cx: &Context,
    id: &str,
    sending: impl Future<Output = Result<(), bollard::errors::Error>>,
) -> Result<(), StepError> {
    let sent = tokio::select! {
        sent = sending => sent.doing(|| "unpacking into the volume".to_owned()).map_err(StepError::from),
        () = cx.cancelled().cancelled() => Err(cancelled()),
    };
    if sent.is_err() {
        // It answers only when the unpacking has ended, which the lost connection makes it do.
        containers::inspect(patient, id).await?;
    }
    sent
}

/// Says why an archive could not be sent whole.
pub(crate) fn unsent(what: String, error: &io::Error) -> StepError {
    match error.kind() {
        io::ErrorKind::BrokenPipe => StepError::unknown(GONE),
        _ => super::storage::failed(what, error),
    }
}
