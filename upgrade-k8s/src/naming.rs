//! Names and annotations of what a run makes in a cluster, found again after a crash.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use upgrade_core::context::Context;

use crate::object::Object;

/// The annotation that carries [`Context::marker`] on what a step makes; a label could not hold it.
pub const MARKER: &str = "upgrade-rs.github.io/marker";

/// The label that carries [`mark`], by which what a step makes is listed.
pub const MARK: &str = "upgrade-rs.github.io/mark";

/// Returns twelve digits that stand for the step in this run, in both directions.
pub fn mark(cx: &Context) -> String {
    Sha256::digest(cx.marker()).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the label selector that finds what this step made.
pub fn selector(cx: &Context) -> String {
    format!("{MARK}={}", mark(cx))
}

/// Names something beside what is called `name`, the same whenever the step is called: `web-green-0123456789ab`.
///
/// Names of most kinds have 63 characters; what does not fit is cut from `name`, and the mark keeps two
/// names apart.
pub fn beside(name: &str, role: &str, cx: &Context) -> String {
    let end = format!("-{role}-{}", mark(cx));
    let room = 63usize.saturating_sub(end.len());
    let start: String = name.chars().take(room).collect();
    format!("{}{end}", start.trim_end_matches(['-', '.']))
}

/// Marks an object as made by this step, so that it is also listed as that.
pub fn put_mark(object: &mut Value, cx: &Context) {
    object["metadata"]["labels"][MARK] = json!(mark(cx));
    put_marker(object, cx);
}

/// Marks an object as made by this step.
pub fn put_marker(object: &mut Value, cx: &Context) {
    object["metadata"]["annotations"][MARKER] = json!(cx.marker());
}

/// Tells whether this step, in this run, made the object.
pub fn is_ours(object: &Object, cx: &Context) -> bool {
    object.annotation(MARKER) == Some(&cx.marker())
}

#[cfg(test)]
mod tests {
    use super::*;
    use upgrade_core::testkit::TestContext;

    #[test]
    fn names_fit_and_are_the_same_in_both_directions() {
        let run = TestContext::new("web");
        assert_eq!(beside("web", "green", &run.forward()), beside("web", "green", &run.back()));
        let long = beside(&"w".repeat(80), "green", &run.forward());
        assert_eq!(long.len(), 63);
        assert!(long.ends_with(&mark(&run.forward())));
        assert_ne!(mark(&run.forward()), mark(&run.beside("api").forward()));
    }

    #[test]
    fn what_is_marked_is_ours() {
        let run = TestContext::new("web");
        let mut object = json!({ "metadata": { "name": "x" } });
        put_mark(&mut object, &run.forward());
        assert!(is_ours(&Object(object.clone()), &run.back()));
        assert!(!is_ours(&Object(object), &run.beside("api").forward()));
    }
}
