//! Makes a pipeline of a file in which every variable is replaced.

use std::collections::BTreeSet;

use semver::{Version, VersionReq};

use super::document::{Document, PresentItem, RequiresItem, TargetItem};
use super::error::Mistake;
use super::node::{Content, Node};
use super::reader::{Reader, count};
use crate::names::PipelineName;
use crate::pipeline::{Pipeline, PresentVersion, Requirement};

/// The keys that hold items of their own.
const SECTIONS: [&str; 8] =
    ["targets", "checks", "steps", "guards", "verify", "rollback_verify", "present", "requires"];

/// Builds the pipeline; `None` if a mistake was noted.
pub(super) fn assemble(reader: &mut Reader<'_>, document: &Node) -> Option<Pipeline> {
    let head: Option<Document> = reader.read(document, &SECTIONS);
    // The rest is read nevertheless: all mistakes of a file are told at once.
    let mut builder = Pipeline::builder(head.as_ref().map_or("unread", |head| head.upgrade.as_str()));
    if let Some(node) = document.get("upgrade")
        && let Some(Err(error)) = node.text().map(PipelineName::try_from)
    {
        reader.wrong(Mistake::new(error.to_string(), node.place.clone()));
    }
    if let Some(range) = version_range(reader, document, "from") {
        builder = builder.from(&range.to_string());
    }
    if let Some(to) = document.get("to").and_then(|node| version(reader, node)) {
        builder = builder.to(&to.to_string());
        reader.cx.to = Some(to);
    }
    for node in reader.list(document, "required_stops") {
        if let Some(stop) = version(reader, node) {
            builder = builder.required_stop(&stop.to_string());
        }
    }
    if let Some(head) = head {
        if let Some(channel) = head.channel {
            builder = builder.channel(channel);
        }
        if let Some(environment) = head.environment {
            builder = builder.environment(environment.clone());
            reader.cx.environment = Some(environment);
        }
        if let Some(environment) = head.require_committed_in {
            builder = builder.require_committed_in(environment);
        }
        if let Some(budget) = head.budget {
            builder = builder.budget(budget);
        }
        builder = builder.commit(head.commit.unwrap_or_default());
        if let (Some(parallel), Some(node)) = (head.max_parallel, document.get("max_parallel")) {
            if count(node) == Some(0) {
                reader.wrong(Mistake::new("`max_parallel` is at least 1", node.place.clone()));
            }
            builder = builder.max_parallel(parallel);
        }
    }
    targets(reader, document);
    for target in reader.cx.targets.values() {
        builder = builder.target(target.target.clone());
    }
    if let Some(node) = document.get("present")
        && let Some(item) = reader.read::<PresentItem>(node, &[])
        && let Some(check) = reader.any_check(node, None)
    {
        builder = builder.present(check, item.fact.unwrap_or_else(|| "version".to_owned()));
    }
    for node in reader.list(document, "requires") {
        let Some(item) = reader.read::<RequiresItem>(node, &[]) else { continue };
        let range = version_range(reader, node, "version");
        if let (Some(check), Some(version)) = (reader.any_check(node, None), range) {
            let present = PresentVersion { check, fact: item.fact.unwrap_or_else(|| "version".to_owned()) };
            builder = builder.requires(Requirement { name: item.name, present, version });
        }
    }
    for (id, check, options) in reader.checks(document, "checks", None) {
        builder = builder.check_with(id, check, options);
    }
    let (mut builder, steps) = super::steps::read(reader, document, builder);
    builder = reader.guards(document, builder, &steps);
    let every: BTreeSet<String> = steps.iter().cloned().collect();
    for (id, check, options) in reader.checks(document, "verify", Some((&steps, &every))) {
        builder = builder.verify_with(id, check, options);
    }
    if document.get("rollback_verify").is_some() {
        // An empty list is an answer: nothing is asked.
        builder = builder.no_rollback_verify();
        for (id, check, options) in reader.checks(document, "rollback_verify", None) {
            builder = builder.rollback_verify(id, check, options);
        }
    }
    if !reader.mistakes.is_empty() {
        return None;
    }
    match builder.build() {
        Ok(pipeline) => Some(pipeline),
        Err(error) => {
            let place = document.get("upgrade").map_or(0..0, |node| node.place.clone());
            reader.wrong(Mistake::new(error.to_string(), place));
            None
        }
    }
}

fn targets(reader: &mut Reader<'_>, document: &Node) {
    let Some(targets) = document.get("targets") else { return };
    if !matches!(targets.content, Content::Mapping(_)) {
        reader.wrong(Mistake::new("`targets` is a mapping: each name with its kind", targets.place.clone()));
    }
    let registry = reader.registry;
    // A target may be reached through another one, wherever in the mapping that stands.
    let reached_directly = |node: &Node| node.get("with").and_then(|with| with.get("via")).is_none();
    let (first, then): (Vec<_>, Vec<_>) = targets.entries().iter().partition(|(_, node)| reached_directly(node));
    for (key, node) in first.into_iter().chain(then) {
        if node.content == Content::Null {
            reader.wrong(Mistake::new(format!("target `{}` is empty", key.name.escape_debug()), key.place.clone()));
            reader.broken.push(key.name.clone());
            continue;
        }
        if reader.read::<TargetItem>(node, &[]).is_some()
            && let Some(kind) = reader.kind(&registry.targets, "target", node)
            && let Some(target) = reader.make(kind, node)
        {
            reader.cx.targets.insert(key.name.clone(), target);
        } else {
            reader.broken.push(key.name.clone());
        }
    }
}

fn version(reader: &mut Reader<'_>, node: &Node) -> Option<Version> {
    let text = node.text().unwrap_or_default();
    match Version::parse(text.trim_start_matches('v')) {
        Ok(version) => Some(version),
        Err(error) => {
            let message = format!("`{}` is not a version: {error}", text.escape_debug());
            reader.wrong(Mistake::new(message, node.place.clone()).with_help("write it as 1.2.3"));
            None
        }
    }
}

fn version_range(reader: &mut Reader<'_>, item: &Node, key: &str) -> Option<VersionReq> {
    let node = item.get(key)?;
    let text = node.text().unwrap_or_default();
    match VersionReq::parse(text) {
        Ok(range) => Some(range),
        Err(error) => {
            let message = format!("`{}` is not a range of versions: {error}", text.escape_debug());
            let help = "write it as \">=1.0.0, <2.0.0\", \"^1.4\" or \"1.4.*\"";
            reader.wrong(Mistake::new(message, node.place.clone()).with_help(help));
            None
        }
    }
}
