//! A pipeline file as a tree in which every key and value knows its place in the text.

use std::fmt;
use std::ops::Range;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::Spanned;

use super::error::Mistake;
use super::template;

/// Locates a key or a value in the text, in bytes; empty if it did not come from one.
pub(super) type Place = Range<usize>;

/// Holds a value and its place.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub(super) content: Content,
    pub(super) place: Place,
}

/// Holds what a value is.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Content {
    Null,
    Bool(bool),
    /// The number, and how it is spelled: `1.10` stays `1.10` where it becomes part of a text.
    Number(Number, String),
    Text(String),
    /// A text that refers to outputs of steps; escaped as in a file.
    Deferred(String),
    List(Vec<Node>),
    Mapping(Vec<(Key, Node)>),
}

/// Holds a key and its place.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Key {
    pub(super) name: String,
    pub(super) place: Place,
}

/// The parser bounds aliases, depth and nodes; this bounds what it is given.
pub(super) const MAX_BYTES: usize = 1024 * 1024;

/// Keys are looked up one by one: this keeps a file of nothing but keys from taking minutes.
const MAX_ENTRIES: usize = 10_000;

/// Reads a text.
pub(super) fn read(text: &str) -> Result<Node, Mistake> {
    if text.len() > MAX_BYTES {
        return Err(Mistake::new("the file is larger than 1 MiB", 0..0)
            .with_help("a pipeline names files, it does not hold them: move contents into files of their own"));
    }
    let options = serde_saphyr::options! { strict_booleans: true, with_snippet: false };
    let mut node: Node = serde_saphyr::from_str_with_options(text, options).map_err(|error| syntax(text, &error))?;
    node.spell_numbers(text);
    Ok(node)
}

fn syntax(text: &str, error: &serde_saphyr::Error) -> Mistake {
    let location = error.location();
    let place = location.map_or(0..0, |location| place_of(text, &location));
    let mut said = error.without_snippet().to_string();
    // The place is shown with its line; naming it twice helps nobody.
    if let Some(location) = &location {
        let (line, column) = (location.line(), location.column());
        said = said.replace(&format!(" at line {line}, column {column}"), "");
        said = said.strip_prefix(&format!("line {line} column {column}: ")).unwrap_or(&said).to_owned();
    }
    if let Some(rest) = said.strip_prefix("duplicate mapping key: ") {
        let key = rest.split(", set ").next().unwrap_or_default();
        return Mistake::new(format!("the key `{key}` is here twice"), place);
    }
    if said.starts_with("multiple YAML documents") {
        return Mistake::new("the file holds more than one document", place)
            .with_help("a file is one pipeline: take out what follows `---`");
    }
    if ["budget breached", "alias ", "recursion limit"].iter().any(|start| said.starts_with(start)) {
        return Mistake::new("the file is too deep or too large, with its aliases written out", place)
            .with_help("use variables where much is repeated");
    }
    if let Some(tab) = tab_in_indentation(text, place.start) {
        return Mistake::new("YAML does not allow tabs for indentation", tab)
            .with_help("write spaces in its place; `expand --tabs=2 FILE` shows the file without tabs");
    }
    Mistake::new(said, place)
}

/// Finds a tab in what a line begins with: the parser names it in many ways, by what it took it for, and
/// at the line before where it took it for the rest of a text.
fn tab_in_indentation(text: &str, at: usize) -> Option<Place> {
    let begin = text.get(..at)?.rfind('\n').map_or(0, |end| end + 1);
    let mut line_begin = begin;
    for line in text[begin..].split('\n').take(2) {
        if let Some(tab) = line.find(|each: char| each != ' ').filter(|at| line[*at..].starts_with('\t')) {
            return Some(line_begin + tab..line_begin + tab + 1);
        }
        line_begin += line.len() + 1;
    }
    None
}

fn place_of(text: &str, location: &serde_saphyr::Location) -> Place {
    let span = location.span();
    if let (Some(start), Some(len)) = (span.byte_offset(), span.byte_len()) {
        let start = start as usize;
        return start..start.saturating_add(len as usize);
    }
    // Errors of the scanner know only line and column.
    let (line, column) = (location.line() as usize, location.column() as usize);
    if line == 0 {
        return 0..0;
    }
    let line_start: usize = text.split_inclusive('\n').take(line - 1).map(str::len).sum();
    let within = text.get(line_start..).unwrap_or_default();
    let start =
        line_start + within.char_indices().nth(column.saturating_sub(1)).map_or(within.trim_end().len(), |(at, _)| at);
    start..start + 1
}

impl Node {
    pub(super) fn new(content: Content, place: Place) -> Self {
        Self { content, place }
    }

    /// Returns the value as configurations are read from it.
    pub(super) fn value(&self) -> Value {
        self.convert(&|text| text.to_owned())
    }

    /// Returns the value as a file would hold it: reading it again gives the same.
    pub(super) fn canonical(&self) -> Value {
        self.convert(&template::escape)
    }

    fn convert(&self, text_of: &dyn Fn(&str) -> String) -> Value {
        match &self.content {
            Content::Null => Value::Null,
            Content::Bool(value) => Value::Bool(*value),
            Content::Number(number, _) => Value::Number(number.clone()),
            Content::Text(text) => Value::String(text_of(text)),
            Content::Deferred(text) => Value::String(text.clone()),
            Content::List(items) => Value::Array(items.iter().map(|item| item.convert(text_of)).collect()),
            Content::Mapping(entries) => Value::Object(
                entries.iter().map(|(key, node)| (key.name.clone(), node.convert(text_of))).collect::<Map<_, _>>(),
            ),
        }
    }

    /// Returns the value of a key of a mapping; one that is null counts as absent.
    pub(super) fn get(&self, name: &str) -> Option<&Node> {
        self.entry(name).map(|(_, node)| node).filter(|node| node.content != Content::Null)
    }

    pub(super) fn entry(&self, name: &str) -> Option<&(Key, Node)> {
        match &self.content {
            Content::Mapping(entries) => entries.iter().find(|(key, _)| key.name == name),
            _ => None,
        }
    }

    pub(super) fn entries(&self) -> &[(Key, Node)] {
        match &self.content {
            Content::Mapping(entries) => entries,
            _ => &[],
        }
    }

    pub(super) fn items(&self) -> &[Node] {
        match &self.content {
            Content::List(items) => items,
            _ => &[],
        }
    }

    pub(super) fn text(&self) -> Option<&str> {
        match &self.content {
            Content::Text(text) | Content::Number(_, text) => Some(text),
            _ => None,
        }
    }

    /// Takes a key out of a mapping.
    pub(super) fn take(&mut self, name: &str) -> Option<Node> {
        match &mut self.content {
            Content::Mapping(entries) => {
                let at = entries.iter().position(|(key, _)| key.name == name)?;
                Some(entries.remove(at).1)
            }
            _ => None,
        }
    }

    /// Puts a value under a key of a mapping, in the place of the one that is there.
    pub(super) fn put(&mut self, name: &str, node: Node) {
        if let Content::Mapping(entries) = &mut self.content {
            match entries.iter_mut().find(|(key, _)| key.name == name) {
                Some((_, old)) => *old = node,
                None => entries.push((Key { name: name.to_owned(), place: node.place.clone() }, node)),
            }
        }
    }

    /// Finds the first text that refers to an output of a step.
    pub(super) fn deferred(&self) -> Option<&Node> {
        match &self.content {
            Content::Deferred(_) => Some(self),
            Content::List(items) => items.iter().find_map(Self::deferred),
            Content::Mapping(entries) => entries.iter().find_map(|(_, node)| node.deferred()),
            _ => None,
        }
    }

    /// Calls `visit` on every text that refers to outputs of steps.
    pub(super) fn each_deferred<'a>(&'a self, visit: &mut dyn FnMut(&'a str, &'a Place)) {
        match &self.content {
            Content::Deferred(text) => visit(text, &self.place),
            Content::List(items) => items.iter().for_each(|item| item.each_deferred(visit)),
            Content::Mapping(entries) => entries.iter().for_each(|(_, node)| node.each_deferred(visit)),
            _ => {}
        }
    }

    /// Follows a path as far as it leads: the last key passed, and the node reached.
    pub(super) fn walk<'a>(&'a self, path: &[String]) -> (Option<&'a Key>, &'a Node) {
        let (mut key, mut node) = (None, self);
        for segment in path {
            match &node.content {
                Content::Mapping(entries) => match entries.iter().find(|(key, _)| key.name == *segment) {
                    Some((found, next)) => (key, node) = (Some(found), next),
                    None => break,
                },
                Content::List(items) => match segment.parse::<usize>().ok().and_then(|at| items.get(at)) {
                    Some(next) => (key, node) = (None, next),
                    None => break,
                },
                _ => break,
            }
        }
        (key, node)
    }

    /// Gives a value, and all in it, the place where it is used.
    pub(super) fn placed(mut self, place: &Place) -> Self {
        self.place = place.clone();
        self.content = match self.content {
            Content::List(items) => Content::List(items.into_iter().map(|item| item.placed(place)).collect()),
            Content::Mapping(entries) => Content::Mapping(
                entries
                    .into_iter()
                    .map(|(key, node)| (Key { place: place.clone(), ..key }, node.placed(place)))
                    .collect(),
            ),
            plain => plain,
        };
        self
    }

    /// Turns a number back into the text that was written: `1.10` is a version, not 1.1.
    pub(super) fn as_text(&mut self) {
        if let Content::Number(_, spelling) = &self.content {
            self.content = Content::Text(spelling.clone());
        }
    }

    fn spell_numbers(&mut self, source: &str) {
        match &mut self.content {
            Content::Number(_, spelling) => {
                if let Some(text) = source.get(self.place.clone())
                    && text.parse::<f64>().is_ok()
                {
                    *spelling = text.to_owned();
                }
            }
            Content::List(items) => items.iter_mut().for_each(|item| item.spell_numbers(source)),
            Content::Mapping(entries) => entries.iter_mut().for_each(|(_, node)| node.spell_numbers(source)),
            _ => {}
        }
    }
}

fn bytes<T>(spanned: &Spanned<T>) -> Place {
    let span = spanned.referenced.span();
    let start = span.byte_offset().unwrap_or_default() as usize;
    start..start.saturating_add(span.byte_len().unwrap_or_default().max(1) as usize)
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Content>::deserialize(deserializer)?;
        let place = bytes(&spanned);
        Ok(Self { content: spanned.value, place })
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ContentVisitor)
    }
}

struct ContentVisitor;

fn bounded<E: serde::de::Error>(entries: usize) -> Result<(), E> {
    if entries > MAX_ENTRIES {
        return Err(E::custom("a list or a mapping has more than 10000 entries"));
    }
    Ok(())
}

impl<'de> Visitor<'de> for ContentVisitor {
    type Value = Content;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text, a number, true, false, a list or a mapping")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Content, E> {
        Ok(Content::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Content, E> {
        Ok(Content::Number(value.into(), value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Content, E> {
        Ok(Content::Number(value.into(), value.to_string()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Content, E> {
        Number::from_f64(value)
            .map(|number| Content::Number(number, value.to_string()))
            .ok_or_else(|| E::custom("this is not a finite number"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Content, E> {
        Ok(Content::Text(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Content, E> {
        Ok(Content::Null)
    }

    fn visit_none<E>(self) -> Result<Content, E> {
        Ok(Content::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Content, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Content, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
            bounded(items.len())?;
        }
        Ok(Content::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Content, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = access.next_key::<Spanned<String>>()? {
            let place = bytes(&key);
            entries.push((Key { name: key.value, place }, access.next_value()?));
            bounded(entries.len())?;
        }
        Ok(Content::Mapping(entries))
    }
}
