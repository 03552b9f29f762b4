//! Old images of a repository, removed when an upgrade is final.

use std::collections::{BTreeSet, HashMap};

use bollard::Docker;
use bollard::models::ImageSummary;
use bollard::query_parameters::{ListContainersOptionsBuilder, ListImagesOptionsBuilder};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;

use super::present;
use crate::error::{Doing, not_cancelled};
use crate::images;
use crate::reference::ImageReference;

/// Removes images of the repository but the newest, and but those that somebody uses.
pub(super) async fn prune(client: &Docker, cx: &Context, image: &ImageReference, keep: u32) -> Result<(), StepError> {
    let repository = image.name();
    let current = present(client, &image.to_string()).await?;
    let filters = HashMap::from([("reference".to_owned(), vec![repository.clone()])]);
    let options = ListImagesOptionsBuilder::new().filters(&filters).build();
    let mut all = client.list_images(Some(options)).await.doing(|| format!("listing the images of {repository}"))?;
    let options = ListContainersOptionsBuilder::new().all(true).build();
    let containers = client.list_containers(Some(options)).await.doing(|| "listing the containers".into())?;
    let used: BTreeSet<_> = containers.into_iter().filter_map(|container| container.image_id).collect();
    all.sort_by_key(|image| (Some(&image.id) != current.as_ref(), std::cmp::Reverse(image.created)));
    let old = all.iter().skip(keep as usize).filter(|image| !used.contains(&image.id));
    for image in old {
        not_cancelled(cx)?;
        for name in names_in(image, &repository) {
            cx.progress(0, None, format!("removing image {name}"));
            images::remove(client, &name, false).await?;
        }
    }
    Ok(())
}

/// The names that an image has in a repository.
fn names_in(image: &ImageSummary, repository: &str) -> Vec<String> {
    let tags = image.repo_tags.iter().filter(|name| name.rsplit_once(':').is_some_and(|(of, _)| of == repository));
    let digests = image.repo_digests.iter().filter(|name| name.split_once('@').is_some_and(|(of, _)| of == repository));
    tags.chain(digests).cloned().collect()
}
