//! Names and labels of what a run makes on an engine, found again after a crash.

use std::collections::HashMap;

use sha2::{Digest, Sha256};
use upgrade_core::context::Context;

/// The label that carries [`Context::marker`] on what is a step's own: one-off containers, helpers,
/// scratch volumes. What is meant to stay is not labelled, or it would differ from what it replaces.
pub const MARKER: &str = "io.github.upgrade-rs.marker";

/// Returns twelve digits that stand for the step in this run, in both directions.
pub fn mark(cx: &Context) -> String {
    mark_of(&cx.marker())
}

fn mark_of(marker: &str) -> String {
    Sha256::digest(marker).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// Names the container that is made beside another one until it takes its place.
pub fn incoming(name: &str, cx: &Context) -> String {
    format!("{name}.incoming-{}", mark(cx))
}

/// Names the container that is complete and about to take the place of another one.
pub fn next(name: &str, cx: &Context) -> String {
    format!("{name}.next-{}", mark(cx))
}

/// Names the container that was replaced and is kept until commit.
pub fn kept(name: &str, cx: &Context) -> String {
    format!("{name}.kept-{}", mark(cx))
}

/// Names the tag that keeps an image from being pruned until commit.
pub fn kept_image(image_id: &str, cx: &Context) -> (String, String) {
    let id: String = image_id.trim_start_matches("sha256:").chars().take(12).collect();
    ("upgrade-kept".to_owned(), format!("{}-{id}", mark(cx)))
}

/// Returns the labels of what is a step's own.
pub fn labels(cx: &Context) -> HashMap<String, String> {
    HashMap::from([(MARKER.to_owned(), cx.marker())])
}

/// Returns the filter that finds what carries [`labels`].
pub fn labelled(cx: &Context) -> HashMap<String, Vec<String>> {
    HashMap::from([("label".to_owned(), vec![format!("{MARKER}={}", cx.marker())])])
}

#[cfg(test)]
mod tests {
    use super::*;
    use upgrade_core::testkit::TestContext;

    #[test]
    fn names_are_the_same_in_both_directions_and_differ_between_steps() {
        let run = TestContext::new("web");
        assert_eq!(kept("web", &run.forward()), kept("web", &run.back()));
        assert_ne!(mark(&run.forward()), mark(&run.beside("api").forward()));
        assert_ne!(mark(&run.forward()), mark(&TestContext::new("web").forward()));
        let (name, tag) = kept_image("sha256:0123456789abcdef", &run.forward());
        assert_eq!(format!("{name}:{tag}").parse::<crate::reference::ImageReference>().unwrap().tag(), Some(&*tag));
    }
}
