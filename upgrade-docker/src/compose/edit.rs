//! Edits of a project's files that leave everything else in them as it is.

use std::collections::BTreeMap;

use yaml_serde::{Mapping, Value};

/// Says why a file is not edited.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EditError {
    #[error("it is not YAML with a map of services")]
    Malformed,
    #[error("the image of `{0}` stands where it cannot be replaced without touching more")]
    Notation(String),
}

/// Sets the images of services in an override file; none makes a new one.
///
/// The edit is made on the text, so that comments stay, and then judged by what it means: whatever
/// would change more than the images is refused.
pub(crate) fn with_images(found: Option<&str>, images: &BTreeMap<String, String>) -> Result<String, EditError> {
    let mut text = found
        .unwrap_or("# Compose reads this file after the project's own. Images are set here by upgrades.\n")
        .to_owned();
    for (service, image) in images {
        let meaning = meaning(&text)?;
        if image_of(&meaning, service) == Some(image) {
            continue;
        }
        let expected = set(meaning, service, image).ok_or(EditError::Malformed)?;
        let edited = set_in_text(&text, service, image);
        if self::meaning(&edited) != Ok(expected) {
            return Err(EditError::Notation(service.clone()));
        }
        text = edited;
    }
    Ok(text)
}

fn meaning(text: &str) -> Result<Value, EditError> {
    match yaml_serde::from_str(text) {
        Ok(Value::Null) => Ok(Value::Mapping(Mapping::new())),
        Ok(value @ Value::Mapping(_)) => Ok(value),
        _ => Err(EditError::Malformed),
    }
}

fn image_of<'a>(meaning: &'a Value, service: &str) -> Option<&'a str> {
    meaning.get("services")?.get(service)?.get("image")?.as_str()
}

fn set(mut meaning: Value, service: &str, image: &str) -> Option<Value> {
    let mut at = &mut meaning;
    for key in ["services", service] {
        let map = at.as_mapping_mut()?;
        if map.get(key).is_none_or(Value::is_null) {
            map.insert(key.into(), Value::Mapping(Mapping::new()));
        }
        at = map.get_mut(key)?;
    }
    at.as_mapping_mut()?.insert("image".into(), image.into());
    Some(meaning)
}

fn indent(line: &str) -> usize {
    line.len() - line.trim_start_matches(' ').len()
}

fn is_content(line: &str) -> bool {
    let trimmed = line.trim_start();
    !trimmed.is_empty() && !trimmed.starts_with('#')
}

/// Tells whether a line opens a block for a key: `key:`, quoted or not, nothing but a comment after it.
fn opens(line: &str, key: &str) -> bool {
    after_key(line, key).is_some_and(|rest| rest.is_empty() || rest.starts_with('#'))
}

fn after_key<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let line = line.trim_start();
    let rest = [key.to_owned(), format!("\"{key}\""), format!("'{key}'")]
        .iter()
        .find_map(|spelled| line.strip_prefix(spelled.as_str())?.strip_prefix(':'))?;
    (rest.is_empty() || rest.starts_with([' ', '\t'])).then(|| rest.trim())
}

/// Where the block that a line opens ends: at the next line with content that is not further in.
fn end_of(lines: &[String], opening: usize) -> usize {
    let depth = indent(&lines[opening]);
    let next = (opening + 1..lines.len()).find(|at| is_content(&lines[*at]) && indent(&lines[*at]) <= depth);
    let mut end = next.unwrap_or(lines.len());
    while end > opening + 1 && !is_content(&lines[end - 1]) {
        end -= 1;
    }
    end
}

fn depth_within(lines: &[String], opening: usize, end: usize) -> usize {
    let first = lines[opening + 1..end].iter().find(|line| is_content(line));
    first.map_or(indent(&lines[opening]) + 2, |line| indent(line))
}

fn set_in_text(text: &str, service: &str, image: &str) -> String {
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let quoted = |text: &str| format!("\"{text}\"");
    let services = match lines.iter().position(|line| indent(line) == 0 && opens(line, "services")) {
        Some(at) => at,
        None => {
            lines.push("services:".into());
            lines.len() - 1
        }
    };
    let end = end_of(&lines, services);
    let depth = depth_within(&lines, services, end);
    let found = (services + 1..end).find(|at| indent(&lines[*at]) == depth && opens(&lines[*at], service));
    let Some(at) = found else {
        let inner = depth + 2;
        lines.insert(end, format!("{:depth$}{service}:", ""));
        lines.insert(end + 1, format!("{:inner$}image: {}", "", quoted(image)));
        return joined(&lines);
    };
    let end = end_of(&lines, at);
    let depth = depth_within(&lines, at, end);
    let line = format!("{:depth$}image: {}", "", quoted(image));
    match (at + 1..end).find(|at| indent(&lines[*at]) == depth && after_key(&lines[*at], "image").is_some()) {
        Some(at) => {
            // Only what follows white space is a comment.
            let comment = lines[at].find(" #").map(|from| lines[at][from..].to_owned()).unwrap_or_default();
            lines[at] = line + &comment;
        }
        None => lines.insert(at + 1, line),
    }
    joined(&lines)
}

fn joined(lines: &[String]) -> String {
    lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect()
}

/// Sets variables of an environment file; none makes a new one.
pub(crate) fn with_variables(found: Option<&str>, variables: &BTreeMap<String, String>) -> String {
    let mut lines: Vec<String> = found.unwrap_or_default().lines().map(str::to_owned).collect();
    for (name, value) in variables {
        if variable(&joined(&lines), name).as_deref() == Some(value) {
            continue;
        }
        let line = format!("{name}={value}");
        // The last one counts.
        match lines.iter().rposition(|line| value_in(line, name).is_some()) {
            Some(at) if lines[at].trim_start().starts_with("export ") => lines[at] = format!("export {line}"),
            Some(at) => lines[at] = line,
            None => lines.push(line),
        }
    }
    joined(&lines)
}

/// Returns what an environment file says of a variable, if it says it plainly.
pub(crate) fn variable(text: &str, name: &str) -> Option<String> {
    let value = text.lines().rev().find_map(|line| value_in(line, name))?;
    let bare = ['"', '\''].iter().find_map(|quote| value.strip_prefix(*quote)?.strip_suffix(*quote));
    Some(bare.unwrap_or(value).to_owned())
}

fn value_in<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let line = line.trim_start();
    let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
    Some(line.strip_prefix(name)?.trim_start().strip_prefix('=')?.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_new_file_holds_the_images_and_nothing_else() {
        let text = with_images(None, &map(&[("api", "shop/api:2"), ("web", "shop/web:2")])).unwrap();
        assert!(text.starts_with("# Compose reads this file"), "{text}");
        assert!(
            text.ends_with("services:\n  api:\n    image: \"shop/api:2\"\n  web:\n    image: \"shop/web:2\"\n"),
            "{text}"
        );
        assert_eq!(with_images(Some(&text), &map(&[("web", "shop/web:2")])).unwrap(), text);
    }

    #[test]
    fn what_stands_in_the_file_stays() {
        let found = "version: '3.7'\nservices:\n    # ours\n    web:\n        ports: [\"80:80\"]\n        image: shop/web:1  # pinned\n    \
                     db:\n        restart: always\n\n# the end\nvolumes:\n    data: {}\n";
        let text = with_images(Some(found), &map(&[("api", "a:2"), ("db", "d:2"), ("web", "w:2")])).unwrap();
        assert_eq!(
            text,
            "version: '3.7'\nservices:\n    # ours\n    web:\n        ports: [\"80:80\"]\n        image: \"w:2\" # pinned\n    \
             db:\n        image: \"d:2\"\n        restart: always\n    api:\n      image: \"a:2\"\n\n# the end\nvolumes:\n    data: {}\n"
        );
    }

    #[test]
    fn what_would_change_more_is_refused() {
        let web = map(&[("web", "w:2")]);
        for found in ["services: { web: { image: w:1 } }\n", "services:\n  web: &base\n    image: w:1\n  api: *base\n"]
        {
            assert_eq!(with_images(Some(found), &web), Err(EditError::Notation("web".into())), "{found}");
        }
        for found in ["- web\n", "services: [web]\n", "services: {\n"] {
            assert_eq!(with_images(Some(found), &web), Err(EditError::Malformed), "{found}");
        }
    }

    #[test]
    fn a_variable_is_replaced_where_it_counts_or_added() {
        let found = "# tags\nTAG=1\nexport OTHER = x\nTAG=\"1.1\"\n";
        assert_eq!(variable(found, "TAG").as_deref(), Some("1.1"));
        assert_eq!(with_variables(Some(found), &map(&[("TAG", "1.1")])), found);
        let text = with_variables(Some(found), &map(&[("NEW", "n"), ("OTHER", "y"), ("TAG", "2")]));
        assert_eq!(text, "# tags\nTAG=1\nexport OTHER=y\nTAG=2\nNEW=n\n");
        assert_eq!(with_variables(None, &map(&[("TAG", "2")])), "TAG=2\n");
    }
}
