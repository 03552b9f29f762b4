//! Objects as people write them down: files of YAML or JSON, of one or many.

use std::path::{Path, PathBuf};

use serde_json::Value;
use upgrade_core::error::StepError;

use crate::object::{Object, ObjectName};
use crate::server::ApiServer;

/// Holds an object to be, and where it was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    /// The object.
    pub object: Object,
    /// The file, and which object of it: `web.yaml, object 2`.
    pub origin: String,
}

impl Manifest {
    /// Reads the objects of a text of YAML or JSON; a `List` is taken apart, and what is empty left out.
    ///
    /// # Errors
    /// It is no YAML, or one of its documents is no object: it lacks `apiVersion`, `kind` or a name.
    pub fn parse(text: &str, origin: &str) -> Result<Vec<Self>, StepError> {
        let options = serde_saphyr::options! { strict_booleans: true, with_snippet: false };
        let documents: Vec<Value> = serde_saphyr::from_multiple_with_options(text, options).map_err(|error| {
            StepError::permanent(format!("{origin} is no YAML"))
                .with_cause(&error)
                .with_hint("correct it there; `kubectl apply --dry-run=client --filename FILE` tries it")
        })?;
        let mut all = Vec::new();
        for (number, document) in documents.into_iter().enumerate() {
            let members = match &document {
                Value::Null => Vec::new(),
                Value::Object(map) if map.get("items").is_some_and(Value::is_array) => {
                    document["items"].as_array().cloned().unwrap_or_default()
                }
                _ => vec![document],
            };
            for object in members {
                all.push(Self::of(object, format!("{origin}, object {}", number + 1))?);
            }
        }
        Ok(all)
    }

    /// Takes one object.
    ///
    /// # Errors
    /// It lacks `apiVersion`, `kind` or a name.
    pub fn of(object: Value, origin: String) -> Result<Self, StepError> {
        let object = Object(object);
        for (field, what) in [("/apiVersion", "apiVersion"), ("/kind", "kind"), ("/metadata/name", "metadata.name")] {
            if object.text(field).is_empty() {
                let hint = match object.text("/metadata/generateName") {
                    "" => format!("write its {what}"),
                    _ => "write a name: one that the server makes up cannot be found again".to_owned(),
                };
                return Err(StepError::permanent(format!("{origin} has no {what}")).with_hint(hint));
            }
        }
        crate::target::check_name(object.name(), "name")
            .map_err(|error| StepError::permanent(format!("{origin}: {error}")).with_hint("correct metadata.name"))?;
        Ok(Self { object, origin })
    }

    /// Reads files, and of directories all that end in `.yaml`, `.yml` or `.json`, by name.
    ///
    /// # Errors
    /// One cannot be read, or as [`Manifest::parse`].
    pub fn read(paths: &[PathBuf]) -> Result<Vec<Self>, StepError> {
        let mut all = Vec::new();
        for path in paths {
            let files = if path.is_dir() { files_in(path)? } else { vec![path.clone()] };
            for file in files {
                let text = std::fs::read_to_string(&file).map_err(|error| unreadable(&file, &error))?;
                all.extend(Self::parse(&text, &file.display().to_string())?);
            }
        }
        Ok(all)
    }

    /// Finds out what the cluster calls the object, in `namespace` where it names none.
    ///
    /// # Errors
    /// The cluster does not have the kind, or cannot be asked.
    pub async fn name(&self, server: &ApiServer, namespace: &str) -> Result<ObjectName, StepError> {
        let (version, kind) = (self.object.text("/apiVersion"), self.object.text("/kind"));
        let Some(kind) = server.find_kind(Some(version), kind).await? else {
            return Err(StepError::permanent(format!("{}: the cluster has no {version} {kind}", self.origin))
                .with_hint(
                    "install its CustomResourceDefinition in an earlier step, or write a version that the cluster has: \
                 `kubectl api-resources`",
                ));
        };
        let own = self.object.namespace();
        Ok(ObjectName::new(kind, if own.is_empty() { namespace } else { own }, self.object.name()))
    }
}

fn files_in(directory: &Path) -> Result<Vec<PathBuf>, StepError> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|error| unreadable(directory, &error))? {
        let path = entry.map_err(|error| unreadable(directory, &error))?.path();
        let is_manifest = path.extension().is_some_and(|end| end == "yaml" || end == "yml" || end == "json");
        if is_manifest && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    if files.is_empty() {
        return Err(StepError::permanent(format!("there is no manifest in {}", directory.display()))
            .with_hint("files that end in .yaml, .yml or .json are read; directories below it are not"));
    }
    Ok(files)
}

fn unreadable(path: &Path, error: &std::io::Error) -> StepError {
    StepError::permanent(format!("{} cannot be read", path.display()))
        .with_cause(error)
        .with_hint("correct its name in `manifests`, or let this user read it")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_many_objects_is_taken_apart() {
        let text = "---\n# nothing\n---\napiVersion: v1\nkind: ConfigMap\nmetadata: { name: a }\ndata: { on: \"off\" }\n---\n\
                    apiVersion: v1\nkind: List\nitems:\n- { apiVersion: v1, kind: Secret, metadata: { name: b } }\n";
        let all = Manifest::parse(text, "x.yaml").unwrap();
        let names: Vec<_> = all.iter().map(|each| each.object.name()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(all[0].object.text("/data/on"), "off");
    }

    #[test]
    fn what_is_no_object_is_named_with_its_place() {
        for (text, says, hint) in [
            ("kind: ConfigMap\nmetadata: { name: a }", "object 1 has no apiVersion", "apiVersion"),
            ("apiVersion: v1\nkind: ConfigMap\nmetadata: { generateName: a- }", "no metadata.name", "made up"),
            ("apiVersion: v1\nkind: ConfigMap\nmetadata: { name: a/b }", "a/b", "metadata.name"),
            ("a: [", "is no YAML", "correct it"),
            ("hello", "no apiVersion", "apiVersion"),
        ] {
            let error = Manifest::parse(text, "x.yaml").unwrap_err();
            assert!(error.message().contains("x.yaml") && error.message().contains(says), "{error:?}");
            assert!(error.hint().unwrap().replace("makes up", "made up").contains(hint), "{error:?}");
        }
        let directory = tempfile::tempdir().unwrap();
        let error = Manifest::read(&[directory.path().to_owned()]).unwrap_err();
        assert!(error.message().contains("no manifest"), "{error:?}");
    }
}
