//! Lays what an environment changes over the file.
//!
//! Mappings are merged key by key, and null takes a key away. A list is replaced, unless every
//! item of the new one has an `id`: those are merged by it, and new ids are added at the end.

use std::collections::BTreeSet;

use super::error::Mistake;
use super::nearest;
use super::node::{Content, Node};

/// Takes `environments` out of a file and lays the chosen one over it; returns its name.
pub(super) fn choose(document: &mut Node, asked_for: Option<&str>) -> Result<Option<String>, Mistake> {
    let environments = document.take("environments").filter(|node| node.content != Content::Null);
    let named = document.get("environment").cloned();
    let place = named.as_ref().map_or(0..0, |node| node.place.clone());
    if let Some(node) = &environments
        && !matches!(node.content, Content::Mapping(_))
    {
        return Err(Mistake::new("`environments` is a mapping: each name with what it changes", node.place.clone()));
    }
    let named = match named.as_ref().map(Node::text) {
        Some(None) => return Err(Mistake::new("`environment` is the name of one", place)),
        Some(Some(name)) => Some(name),
        None => None,
    };
    let Some(chosen) = asked_for.or(named) else { return Ok(None) };
    if chosen.contains("${") {
        return Err(Mistake::new("`environment` chooses the variables, so it cannot refer to one", place)
            .with_help("write the name, and choose another with --env"));
    }
    let overlays = environments.as_ref().map(Node::entries).unwrap_or_default();
    match overlays.iter().find(|(key, _)| key.name == chosen) {
        Some((_, overlay)) if overlay.content == Content::Null => {}
        Some((key, overlay)) => {
            if !matches!(overlay.content, Content::Mapping(_)) {
                return Err(Mistake::new(
                    format!("environment `{chosen}` is a mapping of what it changes"),
                    key.place.clone(),
                ));
            }
            for (key, _) in overlay.entries() {
                if matches!(key.name.as_str(), "environment" | "environments" | "upgrade") {
                    return Err(Mistake::new(
                        format!("an environment cannot change `{}`", key.name),
                        key.place.clone(),
                    ));
                }
            }
            lay(document, overlay);
        }
        // The file's own environment is what the file says without an overlay, unless it is mistyped.
        None if named == Some(chosen)
            && nearest::of(chosen, overlays.iter().map(|(key, _)| key.name.as_str())).is_none() => {}
        None => {
            let known: BTreeSet<&str> = overlays
                .iter()
                .map(|(key, _)| key.name.as_str())
                .chain(named.filter(|named| *named != chosen))
                .collect();
            let place = if asked_for.is_some() { 0..0 } else { place };
            let help = match nearest::of(chosen, known.iter().copied()) {
                Some(near) => format!("did you mean `{near}`?"),
                None if known.is_empty() => format!("name it in the file: `environments: {{ {chosen}: {{}} }}`"),
                None => format!("the environments of this file: {}", nearest::list(known)),
            };
            return Err(Mistake::new(format!("there is no environment `{chosen}`"), place).with_help(help));
        }
    }
    let chosen = chosen.to_owned();
    document.put("environment", Node::new(Content::Text(chosen.clone()), place));
    Ok(Some(chosen))
}

fn lay(base: &mut Node, over: &Node) {
    match (&mut base.content, &over.content) {
        (Content::Mapping(_), Content::Mapping(entries)) => {
            for (key, value) in entries {
                if value.content == Content::Null {
                    base.take(&key.name);
                } else {
                    lay_entry(base, key, value);
                }
            }
        }
        (Content::List(items), Content::List(changes))
            if !changes.is_empty() && changes.iter().all(|item| id(item).is_some()) =>
        {
            for change in changes {
                match items.iter_mut().find(|item| id(item) == id(change)) {
                    Some(item) => lay(item, change),
                    None => items.push(change.clone()),
                }
            }
        }
        _ => *base = over.clone(),
    }
}

fn lay_entry(base: &mut Node, key: &super::node::Key, value: &Node) {
    let Content::Mapping(entries) = &mut base.content else { return };
    match entries.iter_mut().find(|(found, _)| found.name == key.name) {
        Some((_, found)) => lay(found, value),
        None => entries.push((key.clone(), value.clone())),
    }
}

fn id(item: &Node) -> Option<&str> {
    item.get("id").and_then(Node::text)
}
