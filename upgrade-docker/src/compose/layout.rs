//! Which files make a project, by the rules that both versions of Compose share.
//!
//! Run in a directory without `--file`, Compose reads the project's file there and then an override
//! file beside it. Version 1.29 and version 2 know the same names for both, and prefer them in
//! another order; both read the override file whatever the project's file is called. With `--file`,
//! or `COMPOSE_FILE` in `.env`, they read what is named and nothing else.

use std::path::{Path, PathBuf};

use upgrade_core::error::StepError;

use crate::compose::edit;

const FILES: [&str; 4] = ["compose.yaml", "compose.yml", "docker-compose.yaml", "docker-compose.yml"];
const OVERRIDES: [&str; 4] =
    ["compose.override.yaml", "compose.override.yml", "docker-compose.override.yaml", "docker-compose.override.yml"];

/// Finds the override file that Compose reads in a directory by itself, or would if it were there.
///
/// `environment` is what the project's `.env` says.
pub(crate) fn override_file(directory: &Path, environment: Option<&str>) -> Result<PathBuf, StepError> {
    if environment.is_some_and(|text| edit::variable(text, "COMPOSE_FILE").is_some()) {
        return Err(StepError::permanent(format!(
            "COMPOSE_FILE in {} names the files",
            directory.join(".env").display()
        ))
        .with_hint("name the same in `files`, the one that takes the images last"));
    }
    let there = |names: [&str; 4]| {
        names.map(|name| directory.join(name)).into_iter().filter(|path| path.is_file()).collect::<Vec<_>>()
    };
    let named = |paths: &[PathBuf]| {
        paths.iter().filter_map(|path| path.file_name()?.to_str()).collect::<Vec<_>>().join(" and ")
    };
    let (files, overrides) = (there(FILES), there(OVERRIDES));
    let file = match files.as_slice() {
        [file] => file,
        [] => {
            return Err(StepError::permanent(format!("there is no Compose file in {}", directory.display()))
                .with_hint("correct `directory`, or name the project's files in `files`"));
        }
        several => {
            return Err(StepError::permanent(format!("{} holds {}", directory.display(), named(several)))
                .with_hint("versions of Compose differ in which one they read: remove one, or name it in `files`"));
        }
    };
    match overrides.as_slice() {
        [file] => Ok(file.clone()),
        [] => {
            let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            Ok(file.with_file_name(name.replace("compose.", "compose.override.")))
        }
        several => Err(StepError::permanent(format!("{} holds {}", directory.display(), named(several)))
            .with_hint("Compose reads one of them: make one file of them")),
    }
}

/// Names the project as version 1 does, which does not print it.
pub(crate) fn project_name(directory: &Path, environment: Option<&str>) -> String {
    let stated = environment.and_then(|text| edit::variable(text, "COMPOSE_PROJECT_NAME"));
    let name = stated
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| directory.file_name().unwrap_or_default().to_string_lossy().into_owned());
    let plain = |c: &char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '_');
    let name: String = name.to_lowercase().chars().filter(plain).collect();
    if name.is_empty() { "default".into() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_override_file_is_the_one_that_compose_reads() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let find = |environment| override_file(directory.path(), environment);
        assert!(find(None).unwrap_err().message().contains("no Compose file"));
        for (file, expected) in
            [("compose.yaml", "compose.override.yaml"), ("docker-compose.yml", "docker-compose.override.yml")]
        {
            std::fs::write(at(file), "").unwrap();
            assert_eq!(find(None).unwrap(), at(expected));
            std::fs::remove_file(at(file)).unwrap();
        }
        std::fs::write(at("compose.yml"), "").unwrap();
        std::fs::write(at("docker-compose.override.yaml"), "").unwrap();
        assert_eq!(find(Some("TAG=1\n")).unwrap(), at("docker-compose.override.yaml"));
        assert!(find(Some("COMPOSE_FILE=a.yaml:b.yaml")).unwrap_err().hint().unwrap().contains("`files`"));
        std::fs::write(at("compose.override.yml"), "").unwrap();
        assert!(find(None).unwrap_err().message().contains("compose.override.yml and docker-compose.override.yaml"));
        std::fs::write(at("docker-compose.yml"), "").unwrap();
        assert!(find(None).unwrap_err().message().contains("compose.yml and docker-compose.yml"));
    }

    #[test]
    fn a_project_is_named_as_version_1_names_it() {
        assert_eq!(project_name("/srv/My.Shop_1".as_ref(), None), "myshop_1");
        assert_eq!(project_name("/srv/x".as_ref(), Some("COMPOSE_PROJECT_NAME=shop\n")), "shop");
        assert_eq!(project_name("/".as_ref(), None), "default");
    }
}
