//! Pipeline files: YAML to a pipeline, with every mistake shown at its line.
//!
//! ```text
//! text ─► nodes with places ─► environment laid over ─► `${…}` replaced ─► pipeline
//! ```
//!
//! What refers to the output of a step (`${steps.backup.output.path}`) stays as it is until the
//! step has run.

mod assemble;
mod checks;
mod deferred;
mod document;
mod error;
pub(crate) mod nearest;
mod node;
mod overlay;
mod reader;
mod schema;
mod steps;
mod template;
mod variables;

use std::collections::BTreeMap;
use std::path::Path;

use self::error::Mistake;
pub use self::error::{FileError, FileMistake};
use self::node::{Content, Node};
use self::reader::Reader;
pub use self::schema::schema;
use self::variables::Variables;
use crate::entry::Definition;
use crate::pipeline::{Pipeline, Source};
use crate::registry::{BuildContext, Registry};

/// Adjusts a pipeline file from outside: what `--env`, `--to` and `--var` say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LoadOptions {
    /// The environment, instead of the file's.
    pub environment: Option<String>,
    /// The version to upgrade to, instead of the file's.
    pub to: Option<String>,
    /// Values for variables that the file declares; each takes the type of the file's own value.
    pub variables: BTreeMap<String, String>,
}

/// Loads a pipeline file; relative paths in it start from its directory.
///
/// # Errors
/// The file cannot be read, or something is wrong with it.
pub fn load(path: &Path, options: &LoadOptions, registry: &Registry) -> Result<Pipeline, FileError> {
    let unreadable = |error: &dyn std::fmt::Display| {
        let mistake = Mistake::new(format!("{} cannot be read: {error}", path.display()), 0..0)
            .with_help("check the name, and that the account may read it");
        FileError::one(path, "", &mistake)
    };
    let text = read_bounded(path).map_err(|error| unreadable(&error))?;
    let path_from_root = std::path::absolute(path).map_err(|error| unreadable(&error))?;
    parse(&text, path, path_from_root.parent().unwrap_or(Path::new("/")), options, registry)
}

/// Reads a file, but not for ever: a device has no end.
fn read_bounded(path: &Path) -> std::io::Result<String> {
    use std::io::{Error, Read};

    let mut bytes = Vec::new();
    std::fs::File::open(path)?.take(node::MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > node::MAX_BYTES {
        return Err(Error::other("it is larger than 1 MiB"));
    }
    String::from_utf8(bytes).map_err(|_| Error::other("it is not a text in UTF-8"))
}

/// Reads a pipeline from a text; `name` is what messages call it.
///
/// Any text may be given: what is not a pipeline is an error, soon.
///
/// # Errors
/// Something is wrong with it.
pub fn parse(
    text: &str,
    name: &Path,
    base_dir: &Path,
    options: &LoadOptions,
    registry: &Registry,
) -> Result<Pipeline, FileError> {
    // Some editors begin a file with a mark that is no part of it.
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let one = |mistake| FileError::one(name, text, &mistake);
    let mut document = node::read(text).map_err(one)?;
    match document.content {
        Content::Mapping(_) => {}
        Content::Null => {
            return Err(one(Mistake::new("the file is empty", 0..0).with_help("`upgrade init` writes one")));
        }
        _ => return Err(one(Mistake::new("a pipeline is a mapping: `upgrade: NAME`, `steps:` …", document.place))),
    }
    let base_document = base(&document);
    let environment = overlay::choose(&mut document, options.environment.as_deref()).map_err(one)?;
    if let Some(to) = &options.to {
        document.put("to", Node::new(Content::Text(template::escape(to)), 0..0));
    }
    spell_versions(&mut document);
    let mut variables = Variables::take(&mut document, &options.variables, text);
    if let Some(environment) = environment {
        variables.know("environment", Node::new(Content::Text(template::escape(&environment)), 0..0));
    }
    if let Some(to) = document.get("to") {
        variables.know("to", to.clone());
        let reference = Node::new(Content::Text("${to}".to_owned()), to.place.clone());
        document.put("to", reference);
    }
    let document = variables.replace(&document);
    let values = variables.values();
    let collect = |mistakes: &[Mistake]| FileError::collect(name, text, mistakes);
    if let Some(error) = collect(&variables.mistakes) {
        return Err(error);
    }
    let mut reader = Reader {
        registry,
        cx: BuildContext::new(base_dir).with_checks(registry),
        mistakes: Vec::new(),
        broken: Vec::new(),
    };
    let pipeline = assemble::assemble(&mut reader, &document);
    match (pipeline, collect(&reader.mistakes)) {
        (Some(mut pipeline), None) => {
            pipeline.source = Source {
                document: document.canonical(),
                base_document,
                base_dir: base_dir.to_path_buf(),
                variables: values,
            };
            Ok(pipeline)
        }
        (_, Some(error)) => Err(error),
        (None, None) => Err(one(Mistake::new("this is not a pipeline", 0..0))),
    }
}

/// Builds the pipeline of a run again from what its journal holds.
///
/// It has the fingerprint of the first one as long as the files it names are the same.
///
/// # Errors
/// The run's pipeline was built in a program, or a kind that it uses is not there any more.
pub fn reload(definition: &Definition, registry: &Registry) -> Result<Pipeline, FileError> {
    let name = Path::new("the journal's pipeline");
    if definition.document.is_null() {
        let mistake = Mistake::new("the pipeline of this run was built in a program, not loaded from a file", 0..0)
            .with_help("resume the run with that program");
        return Err(FileError::one(name, "", &mistake));
    }
    let text = as_yaml(&definition.document);
    let mut pipeline = parse(&text, name, &definition.base_dir, &LoadOptions::default(), registry)?;
    pipeline.source.document = definition.document.clone();
    pipeline.source.variables = definition.variables.clone();
    Ok(pipeline)
}

/// Writes JSON as YAML takes it: some characters that JSON leaves alone must be escaped.
fn as_yaml(document: &serde_json::Value) -> String {
    let mut text = String::new();
    for c in format!("{document:#}").chars() {
        match c {
            '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}' => {
                text += &format!("\\u{:04x}", c as u32);
            }
            c => text.push(c),
        }
    }
    text
}

/// Returns the file without what makes one environment differ from another.
fn base(document: &Node) -> serde_json::Value {
    let mut document = document.clone();
    for key in ["environments", "environment", "to", "require_committed_in"] {
        document.take(key);
    }
    document.value()
}

/// A version that looks like a number is the text that was written.
fn spell_versions(document: &mut Node) {
    let Content::Mapping(entries) = &mut document.content else { return };
    for (key, node) in entries {
        match (key.name.as_str(), &mut node.content) {
            ("from" | "to", _) => node.as_text(),
            ("required_stops", Content::List(items)) => items.iter_mut().for_each(Node::as_text),
            ("requires", Content::List(items)) => {
                for entry in items.iter_mut().filter_map(|item| match &mut item.content {
                    Content::Mapping(entries) => entries.iter_mut().find(|(key, _)| key.name == "version"),
                    _ => None,
                }) {
                    entry.1.as_text();
                }
            }
            _ => {}
        }
    }
}
