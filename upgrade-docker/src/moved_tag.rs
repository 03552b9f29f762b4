//! A tag that comes to name another image, and is put back.

use bollard::Docker;
use bollard::query_parameters::TagImageOptionsBuilder;
use serde::{Deserialize, Serialize};

use crate::error::{DockerError, Doing};
use crate::images;
use crate::reference::ImageReference;

/// Holds what putting a tag back needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MovedTag {
    pub(crate) reference: ImageReference,
    /// The image that it named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) found: Option<String>,
}

impl MovedTag {
    pub(crate) async fn give(&self, client: &Docker, image_id: &str) -> Result<(), DockerError> {
        let tag = self.reference.tag().unwrap_or("latest");
        let options = TagImageOptionsBuilder::new().repo(&self.reference.name()).tag(tag).build();
        client.tag_image(image_id, Some(options)).await.doing(|| format!("tagging an image as {}", self.reference))
    }

    /// Puts the tag back, unless somebody moved it on meanwhile.
    pub(crate) async fn put_back(&self, client: &Docker, intended: &str) -> Result<(), DockerError> {
        let name = self.reference.to_string();
        let present = images::local(client, &name).await?.and_then(|image| image.id);
        match (&self.found, present) {
            (_, Some(present)) if present != intended => Ok(()),
            (Some(found), _) => self.give(client, found).await,
            (None, None) => Ok(()),
            (None, Some(_)) => images::remove(client, &name, true).await,
        }
    }
}
