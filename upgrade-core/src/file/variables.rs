//! Replaces `${…}` in a file: variables, the version, the environment. Outputs of steps stay.

use std::collections::BTreeMap;
use std::ops::Range;

use semver::Version;
use serde_json::Value;

use super::error::Mistake;
use super::nearest;
use super::node::{Content, Node, Place};
use super::reader::MAX_MISTAKES;
use super::template::{self, OutputRef, Part};

/// What a file can grow to by variables that repeat each other.
const MAX_GROWTH: usize = 4 * 1024 * 1024;

/// What one text may refer to: each is looked for in the file where it is wrong.
const MAX_REFERENCES: usize = 200;

const RESERVED: [&str; 4] = ["to", "from", "environment", "steps"];

/// Holds the variables of a file and resolves them as they are asked for.
pub(super) struct Variables<'a> {
    source: &'a str,
    declared: BTreeMap<String, Node>,
    resolved: BTreeMap<String, Node>,
    resolving: Vec<String>,
    growth: usize,
    pub(super) mistakes: Vec<Mistake>,
}

impl<'a> Variables<'a> {
    /// Takes `vars` out of a file, and what the caller says instead.
    pub(super) fn take(document: &mut Node, given: &BTreeMap<String, String>, source: &'a str) -> Self {
        let mut variables = Self {
            source,
            declared: BTreeMap::new(),
            resolved: BTreeMap::new(),
            resolving: Vec::new(),
            growth: 0,
            mistakes: Vec::new(),
        };
        let vars = document.take("vars");
        if let Some(vars) = &vars
            && !matches!(vars.content, Content::Mapping(_) | Content::Null)
        {
            variables.mistakes.push(Mistake::new("`vars` is a mapping: each name with its value", vars.place.clone()));
        }
        for (key, node) in vars.iter().flat_map(Node::entries) {
            let well_formed = key.name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                && key.name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
            if RESERVED.contains(&key.name.as_str()) {
                let message = format!("`{}` has a meaning of its own; no variable can be called so", key.name);
                variables.mistakes.push(Mistake::new(message, key.place.clone()));
            } else if !well_formed {
                let message = format!("`{}` is not a name for a variable", key.name.escape_debug());
                let help = "a letter first, then letters, digits, `-` and `_`";
                variables.mistakes.push(Mistake::new(message, key.place.clone()).with_help(help));
            } else {
                variables.declared.insert(key.name.clone(), node.clone());
            }
        }
        for (name, text) in given {
            variables.give(name, text);
        }
        variables
    }

    /// Sets a variable from outside; the text becomes what the file's own value is.
    fn give(&mut self, name: &str, text: &str) {
        let Some(node) = self.declared.get_mut(name) else {
            let help = if self.declared.is_empty() {
                format!("declare it in the file: `vars: {{ {name}: … }}`")
            } else {
                nearest::help("the variables of this file", name, self.declared.keys().map(String::as_str))
            };
            self.mistakes.push(Mistake::new(format!("there is no variable `{name}` to set"), 0..0).with_help(help));
            return;
        };
        let value = match &node.content {
            // What is given is a text, never a template.
            Content::Text(_) | Content::Null => Ok(Content::Text(template::escape(text))),
            Content::Bool(_) => text.parse().map(Content::Bool).map_err(|_| "true or false"),
            Content::Number(..) => match serde_json::from_str(text) {
                Ok(Value::Number(number)) => Ok(Content::Number(number, text.to_owned())),
                _ => Err("a number"),
            },
            _ => Err("a list or a mapping, which can be changed only in the file"),
        };
        match value {
            Ok(content) => node.content = content,
            Err(expected) => {
                let message = format!("variable `{name}` is {expected}; it cannot be set to `{}`", text.escape_debug());
                self.mistakes.push(Mistake::new(message, node.place.clone()));
            }
        }
    }

    /// Makes the version and the environment known as `${to}` and `${environment}`.
    pub(super) fn know(&mut self, name: &str, node: Node) {
        self.declared.insert(name.to_owned(), node);
    }

    /// Returns every variable, resolved.
    pub(super) fn values(&mut self) -> BTreeMap<String, Value> {
        let names: Vec<String> =
            self.declared.keys().filter(|name| !RESERVED.contains(&name.as_str())).cloned().collect();
        names.into_iter().filter_map(|name| Some((name.clone(), self.resolve(&name, &(0..0))?.value()))).collect()
    }

    /// Replaces every reference in a value.
    pub(super) fn replace(&mut self, node: &Node) -> Node {
        let content = match &node.content {
            Content::Text(text) if text.contains("${") => return self.replace_text(text, &node.place),
            Content::List(items) => Content::List(items.iter().map(|item| self.replace(item)).collect()),
            Content::Mapping(entries) => {
                Content::Mapping(entries.iter().map(|(key, node)| (key.clone(), self.replace(node))).collect())
            }
            plain => plain.clone(),
        };
        Node::new(content, node.place.clone())
    }

    fn replace_text(&mut self, text: &str, place: &Place) -> Node {
        let unchanged = || Node::new(Content::Text(text.to_owned()), place.clone());
        if self.mistakes.len() >= MAX_MISTAKES {
            return unchanged();
        }
        let parts = match template::parts(text) {
            Ok(parts) => parts,
            Err(range) => {
                let at = self.within(text, range, place);
                self.mistakes.push(
                    Mistake::new("`${` is not closed with `}`", at)
                        .with_help("write `$${` for the characters themselves"),
                );
                return unchanged();
            }
        };
        if parts.len() > MAX_REFERENCES {
            let message = format!("this text has more than {MAX_REFERENCES} parts");
            self.mistakes.push(Mistake::new(message, place.clone()));
            return unchanged();
        }
        let mut out = String::new();
        let mut literal = String::new();
        let mut deferred = false;
        let alone = parts.len() == 1;
        for part in parts {
            let (expression, range) = match part {
                Part::Text(text) => {
                    literal.push_str(&text);
                    continue;
                }
                Part::Reference(expression, range) => (expression, range),
            };
            let at = self.within(text, range, place);
            if expression == "steps" || expression.starts_with("steps.") {
                if OutputRef::read(expression).is_none() {
                    let message = format!("`${{{expression}}}` does not name an output of a step");
                    self.mistakes.push(Mistake::new(message, at).with_help("write it as `${steps.ID.output.KEY}`"));
                }
                deferred = true;
                out += &template::escape_before_reference(&std::mem::take(&mut literal));
                out += &format!("${{{expression}}}");
                continue;
            }
            let Some(value) = self.find(expression, &at) else { continue };
            if alone {
                return value.placed(place);
            }
            match &value.content {
                Content::Text(text) | Content::Number(_, text) => literal.push_str(text),
                Content::Bool(value) => literal.push_str(if *value { "true" } else { "false" }),
                _ => {
                    let message = format!("`${{{expression}}}` is a list or a mapping; it cannot stand within a text");
                    self.mistakes
                        .push(Mistake::new(message, at).with_help("let it stand alone: then it keeps its type"));
                }
            }
        }
        if deferred {
            return Node::new(Content::Deferred(out + &template::escape(&literal)), place.clone());
        }
        Node::new(Content::Text(literal), place.clone())
    }

    fn find(&mut self, expression: &str, at: &Place) -> Option<Node> {
        let mut path = expression.split('.');
        let name = path.next().unwrap_or_default();
        if name == "from" {
            self.mistakes.push(
                Mistake::new("`${from}` is known only while the run goes on", at.clone())
                    .with_help("take it from a step's output, or set a variable with --var"),
            );
            return None;
        }
        let node = self.resolve(name, at)?;
        let path: Vec<String> = path.map(str::to_owned).collect();
        let found = path.iter().enumerate().try_fold(&node, |node, (depth, _)| {
            let next = node.walk(&path[depth..=depth]).1;
            (!std::ptr::eq(node, next)).then_some(next)
        });
        match found {
            Some(found) => Some(found.clone()),
            None => {
                self.mistakes.push(Mistake::new(format!("`{name}` has nothing at `{}`", path.join(".")), at.clone()));
                None
            }
        }
    }

    fn resolve(&mut self, name: &str, at: &Place) -> Option<Node> {
        if let Some(node) = self.resolved.get(name).cloned() {
            self.growth = self.growth.saturating_add(size(&node));
            if self.growth > MAX_GROWTH {
                // Told once: whatever is replaced from here on would say the same.
                if !self.mistakes.iter().any(|mistake| mistake.message.starts_with("the variables make")) {
                    self.mistakes.push(Mistake::new("the variables make the file larger than 4 MiB", at.clone()));
                }
                return None;
            }
            return Some(node);
        }
        if let Some(start) = self.resolving.iter().position(|resolving| resolving == name) {
            let mut circle = self.resolving[start..].to_vec();
            circle.push(name.to_owned());
            let message = format!("the variables refer to each other in a circle: {}", circle.join(" → "));
            self.mistakes.push(Mistake::new(message, at.clone()));
            return None;
        }
        let Some(declared) = self.declared.get(name).cloned() else {
            let message = match name {
                "to" => "`${to}` is not known: the file names no version".to_owned(),
                "environment" => "`${environment}` is not known: the file names no environment".to_owned(),
                _ => format!("unknown variable `{}`", name.escape_debug()),
            };
            let help = match name {
                "to" => "write `to:` in the file, or give --to".to_owned(),
                "environment" => "write `environment:` in the file, or give --env".to_owned(),
                _ => {
                    let known: Vec<&str> =
                        self.declared.keys().map(String::as_str).chain(["to", "environment"]).collect();
                    nearest::help("known here", name, known.iter().copied())
                }
            };
            self.mistakes.push(Mistake::new(message, at.clone()).with_help(help));
            return None;
        };
        // A chain of variables is as deep as the file is long; the stack is not.
        if self.resolving.len() >= 64 {
            self.mistakes.push(Mistake::new("the variables refer to each other more than 64 deep", at.clone()));
            return None;
        }
        self.resolving.push(name.to_owned());
        let before = self.mistakes.len();
        let mut node = self.replace(&declared);
        self.resolving.pop();
        if self.mistakes.len() > before {
            // What is wrong with it was said; saying it again at each use helps nobody.
            node = Node::new(Content::Null, node.place);
        } else if let Some(found) = node.deferred() {
            let message = "the output of a step is known only while the run goes on; no variable can hold it";
            self.mistakes
                .push(Mistake::new(message, found.place.clone()).with_help("write `${steps.…}` where it is needed"));
        } else if name == "to"
            && let Some(text) = node.text()
        {
            match Version::parse(text.trim_start_matches('v')) {
                Ok(version) => node.content = Content::Text(version.to_string()),
                Err(error) => {
                    let message = format!("`{}` is not a version: {error}", text.escape_debug());
                    let place = node.place.clone();
                    self.mistakes.push(Mistake::new(message, place).with_help("write it as 1.2.3"));
                }
            }
        }
        self.resolved.insert(name.to_owned(), node);
        self.resolve(name, at)
    }

    /// Finds the place of a part of a text, however the text is quoted.
    fn within(&self, text: &str, range: Range<usize>, place: &Place) -> Place {
        let Some(shown) = self.source.get(place.clone()) else { return place.clone() };
        let part = &text[range.clone()];
        let earlier = text[..range.start].matches(part).count();
        match shown.match_indices(part).nth(earlier) {
            Some((at, _)) => place.start + at..place.start + at + part.len(),
            None => place.clone(),
        }
    }
}

fn size(node: &Node) -> usize {
    match &node.content {
        Content::Text(text) | Content::Deferred(text) => text.len() + 1,
        Content::List(items) => items.iter().map(size).sum::<usize>() + 1,
        Content::Mapping(entries) => entries.iter().map(|(key, node)| key.name.len() + size(node)).sum::<usize>() + 1,
        _ => 8,
    }
}
