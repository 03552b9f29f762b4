//! Reads typed values and kinds from nodes, and collects what is wrong with them.

use std::collections::BTreeMap;

use schemars::SchemaGenerator;
use serde::de::DeserializeOwned;
use serde_json::{Map, Number, Value};

use super::error::Mistake;
use super::nearest;
use super::node::{Content, Node, Place};
use super::template::{self, Part};
use crate::registry::{BuildContext, Kind, MakeError, Registry, from_value, no_target};

/// The adapters of this project, which a program may be built without.
const ADAPTERS: [&str; 3] = ["postgres", "docker", "k8s"];

/// What is worth showing at once; guessing what was meant takes time.
pub(super) const MAX_MISTAKES: usize = 50;

/// Ids and what they need are compared with each other.
const MAX_ITEMS: usize = 2_000;

/// Reads the parts of one file.
pub(super) struct Reader<'a> {
    pub(super) registry: &'a Registry,
    pub(super) cx: BuildContext,
    pub(super) mistakes: Vec<Mistake>,
    /// Targets that are named, and wrong: who uses one has made no mistake by that.
    pub(super) broken: Vec<String>,
}

impl Reader<'_> {
    pub(super) fn wrong(&mut self, mistake: Mistake) {
        if !self.broken.iter().any(|target| mistake.message == no_target(target)) {
            self.mistakes.push(mistake);
        }
    }

    /// Tells whether so much is wrong already that nobody would read more.
    pub(super) fn is_full(&self) -> bool {
        self.mistakes.len() >= MAX_MISTAKES
    }

    /// Reads a mapping; references to outputs may stand only under the keys of `deferrable`.
    pub(super) fn read<T: DeserializeOwned>(&mut self, node: &Node, deferrable: &[&str]) -> Option<T> {
        if !matches!(node.content, Content::Mapping(_)) {
            self.wrong(Mistake::new("a mapping of keys to values is expected here", node.place.clone()));
            return None;
        }
        for (key, value) in node.entries() {
            if !deferrable.contains(&key.name.as_str())
                && let Some(found) = value.deferred()
            {
                let message = format!("`{}` cannot refer to the output of a step here", key.name);
                let help =
                    "outputs are known only while the run goes on: use them under `with` and `when` of a later step";
                self.wrong(Mistake::new(message, found.place.clone()).with_help(help));
                return None;
            }
        }
        match from_value(node.value()) {
            Ok(value) => Some(value),
            Err(error) => {
                let place = node.get("uses").or(node.get("id")).map_or(&node.place, |node| &node.place);
                let mistake = mistake(node, place, error);
                self.wrong(mistake);
                None
            }
        }
    }

    /// Returns the items of a list under a key; nothing if the key is absent.
    pub(super) fn list<'n>(&mut self, node: &'n Node, name: &str) -> &'n [Node] {
        match node.get(name) {
            _ if self.is_full() => &[],
            Some(Node { content: Content::List(items), place }) if items.len() > MAX_ITEMS => {
                self.wrong(Mistake::new(format!("`{name}` has more than {MAX_ITEMS} items"), place.clone()));
                &[]
            }
            Some(Node { content: Content::List(items), .. }) => items,
            Some(other) => {
                self.wrong(Mistake::new(format!("`{name}` is a list: each item starts with `-`"), other.place.clone()));
                &[]
            }
            None => &[],
        }
    }

    /// Finds the kind that an item uses.
    pub(super) fn kind<'k, T>(
        &mut self,
        kinds: &'k BTreeMap<String, Kind<T>>,
        what: &str,
        item: &Node,
    ) -> Option<&'k Kind<T>> {
        let uses = item.get("uses")?;
        let name = uses.text()?;
        if let Some(kind) = kinds.get(name) {
            return Some(kind);
        }
        let prefix = name.split('.').next().unwrap_or_default();
        let registry = self.registry;
        let all = || registry.steps.keys().chain(registry.checks.keys()).chain(registry.targets.keys());
        let others = [
            ("step", registry.steps.contains_key(name)),
            ("check", registry.checks.contains_key(name)),
            ("target", registry.targets.contains_key(name)),
        ];
        let help = if let Some((other, _)) = others.iter().find(|(_, known)| *known) {
            format!("`{name}` is a kind of {other}")
        } else if ADAPTERS.contains(&prefix) && !all().any(|kind| kind.split('.').next() == Some(prefix)) {
            format!("the adapter `{prefix}` is not built into this program: build it with the feature `{prefix}`")
        } else if let Some(near) = nearest::of(name, kinds.keys().map(String::as_str)) {
            format!("did you mean `{near}`?")
        } else {
            let family: Vec<&str> =
                kinds.keys().map(String::as_str).filter(|kind| kind.split('.').next() == Some(prefix)).collect();
            let known = if family.is_empty() { kinds.keys().map(String::as_str).collect() } else { family };
            format!("known kinds of {what}: {}", nearest::list(known))
        };
        self.wrong(
            Mistake::new(format!("unknown kind of {what} `{}`", name.escape_debug()), uses.place.clone())
                .with_help(help),
        );
        None
    }

    /// Makes what an item describes.
    pub(super) fn make<T>(&mut self, kind: &Kind<T>, item: &Node) -> Option<T> {
        let with = self.with(item)?;
        match (kind.make)(with.value(), &self.cx) {
            Ok(made) => Some(made),
            Err(error) => {
                let mistake = mistake(&with, &place_of_with(item), error);
                self.wrong(mistake);
                None
            }
        }
    }

    /// Tries to make what an item describes while the outputs it refers to are not known.
    ///
    /// Returns it with the text that stood for them. `None` is no mistake: the configuration may
    /// need the real values. What is wrong whatever they are is told.
    pub(super) fn probe<T>(&mut self, kind: &Kind<T>, item: &Node) -> Option<(T, &'static str)> {
        let with = self.with(item)?;
        let stand_ins =
            [(Value::from("known-later"), "known-later"), (Value::from(1), "1"), (Value::from(true), "true")];
        let mut first = None;
        for (stand_in, text) in &stand_ins {
            match (kind.make)(stand(&with, stand_in), &self.cx) {
                Ok(made) => return Some((made, text)),
                Err(error) => first.get_or_insert(error),
            };
        }
        if let Some(error) = first.filter(|error| is_certain(&with, error)) {
            let mistake = mistake(&with, &place_of_with(item), error);
            self.wrong(mistake);
        } else if let Some(known) = properties(kind) {
            for (key, _) in with.entries().iter().filter(|(key, _)| !known.contains(&key.name)) {
                let mistake = unknown_key(&key.name, key.place.clone(), known.iter().map(String::as_str));
                self.wrong(mistake);
            }
        }
        None
    }

    /// Returns an item's configuration; an empty one if there is none.
    pub(super) fn with(&mut self, item: &Node) -> Option<Node> {
        match item.get("with") {
            None => Some(Node::new(Content::Mapping(Vec::new()), place_of_with(item))),
            Some(with) if matches!(with.content, Content::Mapping(_)) => Some(with.clone()),
            Some(with) => {
                self.wrong(Mistake::new("`with` is a mapping: each key with its value", with.place.clone()));
                None
            }
        }
    }
}

fn place_of_with(item: &Node) -> Place {
    match item.entry("with") {
        Some((key, _)) => key.place.clone(),
        None => item.get("uses").map_or_else(|| item.place.clone(), |uses| uses.place.clone()),
    }
}

/// Puts a value in for what is not known yet.
fn stand(node: &Node, stand_in: &Value) -> Value {
    match &node.content {
        Content::Deferred(text) => match template::parts(text).as_deref() {
            Ok([Part::Reference(..)]) => stand_in.clone(),
            Ok(parts) => Value::String(
                parts
                    .iter()
                    .map(|part| if let Part::Text(text) = part { text.as_str() } else { "known-later" })
                    .collect(),
            ),
            Err(_) => Value::String(text.clone()),
        },
        Content::List(items) => Value::Array(items.iter().map(|item| stand(item, stand_in)).collect()),
        Content::Mapping(entries) => Value::Object(
            entries.iter().map(|(key, node)| (key.name.clone(), stand(node, stand_in))).collect::<Map<_, _>>(),
        ),
        _ => node.value(),
    }
}

/// Tells whether a mistake stays one whatever the outputs will be.
fn is_certain(with: &Node, error: &MakeError) -> bool {
    match error {
        MakeError::Shape { message, path } => {
            message.starts_with("unknown field `")
                || message.starts_with("missing field `")
                || with.walk(path).1.deferred().is_none()
        }
        MakeError::Build(error) => error.key.as_deref().is_some_and(|key| {
            let (found, node) = with.walk(&segments(key));
            found.is_some() && node.deferred().is_none()
        }),
    }
}

/// Lists the keys of a kind's configuration; `None` if it takes others as well.
fn properties<T>(kind: &Kind<T>) -> Option<Vec<String>> {
    let mut generator = SchemaGenerator::default();
    let schema = (kind.schema)(&mut generator);
    let schema = match schema.get("$ref").and_then(Value::as_str) {
        Some(reference) => generator.definitions().get(reference.rsplit('/').next()?)?.clone(),
        None => schema.to_value(),
    };
    if schema.get("additionalProperties") != Some(&Value::Bool(false)) {
        return None;
    }
    Some(schema.get("properties")?.as_object()?.keys().cloned().collect())
}

fn segments(key: &str) -> Vec<String> {
    key.split('.').map(str::to_owned).collect()
}

fn unknown_key<'a>(name: &str, place: Place, known: impl IntoIterator<Item = &'a str> + Clone) -> Mistake {
    let mistake = Mistake::new(format!("unknown key `{}`", name.escape_debug()), place);
    if known.clone().into_iter().next().is_none() {
        return mistake.with_help("no key is known here");
    }
    mistake.with_help(nearest::help("known keys", name, known))
}

/// Lists what stands in backticks.
fn quoted(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

/// Finds the line that an error about a configuration is about.
///
/// `outer` is where a key that is missing would be looked for.
fn mistake(node: &Node, outer: &Place, error: MakeError) -> Mistake {
    let (message, path) = match error {
        MakeError::Build(error) => {
            let path = error.key.as_deref().map(segments).unwrap_or_default();
            let (key, at) = node.walk(&path);
            let place = if path.is_empty() { outer } else { pointed(key.map(|key| &key.place), at) };
            let mistake = Mistake::new(error.message, place.clone());
            return Mistake { help: error.hint, ..mistake };
        }
        MakeError::Shape { message, path } => (message, path),
    };
    let (key, at) = node.walk(&path);
    let around = key.map_or(outer, |key| &key.place);
    // serde_json's own place is one in a text that nobody wrote.
    let message = message.split(" at line ").next().unwrap_or_default().to_owned();
    let names = quoted(&message);
    if message.starts_with("unknown field `") {
        let name = names.first().copied().unwrap_or_default();
        let place = match (at.entry(name), key) {
            (Some((key, _)), _) => &key.place,
            (None, Some(key)) if key.name == name => &key.place,
            _ => around,
        };
        return unknown_key(name, place.clone(), names[1..].iter().copied());
    }
    if message.starts_with("missing field `") {
        let name = names.first().copied().unwrap_or_default();
        let place = if path.is_empty() { outer } else { pointed(key.map(|key| &key.place), at) };
        return Mistake::new(format!("the key `{name}` is missing"), place.clone());
    }
    let place = if path.is_empty() { outer } else { &at.place };
    if message.starts_with("unknown variant `") {
        let name = names.first().copied().unwrap_or_default();
        let help = nearest::help("one of", name, names[1..].iter().copied());
        return Mistake::new(format!("`{}` is not known here", name.escape_debug()), place.clone()).with_help(help);
    }
    let number_for_text =
        message.contains("expected a string") && matches!(at.content, Content::Number(..) | Content::Bool(_));
    let mut mistake = Mistake::new(plainly(&message), place.clone());
    mistake.hidden = message.starts_with("a secret ");
    if number_for_text {
        mistake.with_help("put it in quotes, and it is a text")
    } else if message.ends_with("expected map with a single key") {
        mistake
            .with_help("an environment takes a key of the file away with null: `{ after: null, confirm_within: 10m }`")
    } else {
        mistake
    }
}

/// Says in the file's own words what serde says in Rust's.
fn plainly(message: &str) -> String {
    let said = message.strip_prefix("invalid type: ").or_else(|| message.strip_prefix("invalid value: "));
    let Some((found, expected)) = said.and_then(|said| said.rsplit_once(", expected ")) else {
        return message.to_owned();
    };
    if (found, expected) == ("map", "map with a single key") {
        return "exactly one key is expected in this mapping".to_owned();
    }
    let expected = match expected {
        "a string" | "string" => "a text",
        "a boolean" => "true or false",
        "a sequence" => "a list",
        "a map" => "a mapping",
        "map with a single key" => "a mapping with one key",
        "a nonzero u32" => "a whole number from 1 on",
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number that is not negative",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        other if other.starts_with("struct ") => "a mapping",
        other => other,
    };
    let found = match found.split_once(' ') {
        Some(("string", text)) => format!("the text {text}"),
        Some(("integer" | "floating", number)) => format!("the number {}", number.trim_start_matches("point ")),
        Some(("boolean", value)) => value.to_owned(),
        _ => match found {
            "map" => "a mapping".to_owned(),
            "sequence" => "a list".to_owned(),
            "null" => "nothing".to_owned(),
            other => other.to_owned(),
        },
    };
    format!("{expected} is expected here, not {found}")
}

/// Points at a plain value itself, at anything longer by its key.
fn pointed<'a>(key: Option<&'a Place>, at: &'a Node) -> &'a Place {
    match (&at.content, key) {
        (Content::List(_) | Content::Mapping(_), Some(key)) => key,
        _ => &at.place,
    }
}

/// Reads a count, for messages about numbers that are too small.
pub(super) fn count(node: &Node) -> Option<u64> {
    match &node.content {
        Content::Number(number, _) => Number::as_u64(number),
        _ => None,
    }
}
