//! The images that a Dockerfile is built on, which an engine may pull to build it.

use std::collections::{BTreeMap, BTreeSet};

use crate::reference::ImageReference;

/// Lists the images that a Dockerfile names, as far as its text and these arguments tell.
///
/// One whose name hangs on an argument that is a secret, or that the engine makes up, is not among
/// them; nor are stages.
pub(crate) fn of(dockerfile: &str, arguments: &BTreeMap<String, String>) -> BTreeSet<String> {
    let mut known: BTreeMap<String, String> = BTreeMap::new();
    let (mut stages, mut bases, mut begun) = (BTreeSet::new(), BTreeSet::new(), false);
    for line in joined(dockerfile) {
        let mut words = line.split_whitespace();
        let instruction = words.next().unwrap_or_default().to_ascii_uppercase();
        let (flags, words): (Vec<_>, Vec<_>) = words.partition(|word| word.starts_with("--"));
        let mut add = |name: &str, stages: &BTreeSet<String>| {
            let Some(name) = filled(name, &known) else { return };
            if name == "scratch" || stages.contains(&name.to_lowercase()) || name.parse::<usize>().is_ok() {
                return;
            }
            if let Ok(image) = name.parse::<ImageReference>() {
                bases.insert(image.to_string());
            }
        };
        match instruction.as_str() {
            // Those after the first stage began are not for names of images.
            "ARG" if !begun => {
                for word in words {
                    let (name, default) = word.split_once('=').map_or((word, None), |(name, text)| (name, Some(text)));
                    let default = default.map(|text| text.trim_matches(['"', '\'']).to_owned());
                    if let Some(text) = arguments.get(name).cloned().or(default) {
                        known.insert(name.to_owned(), text);
                    }
                }
            }
            "FROM" => {
                begun = true;
                if let Some(name) = words.first() {
                    add(name, &stages);
                }
                if let [_, named, stage, ..] = words[..]
                    && named.eq_ignore_ascii_case("as")
                {
                    stages.insert(stage.to_lowercase());
                }
            }
            "COPY" => {
                if let Some(name) = flags.iter().find_map(|flag| flag.strip_prefix("--from=")) {
                    add(name, &stages);
                }
            }
            _ => {}
        }
    }
    bases
}

/// The instructions, each on one line; comments are none.
fn joined(dockerfile: &str) -> Vec<String> {
    let (mut lines, mut begun) = (Vec::new(), String::new());
    for line in dockerfile.lines().filter(|line| !line.trim_start().starts_with('#')) {
        match line.trim_end().strip_suffix('\\') {
            Some(part) => begun = begun + part + " ",
            None => lines.push(std::mem::take(&mut begun) + line),
        }
    }
    lines.push(begun);
    lines
}

/// Puts arguments into their places: `$NAME`, `${NAME}`, `${NAME:-default}`.
fn filled(text: &str, known: &BTreeMap<String, String>) -> Option<String> {
    let mut filled = String::new();
    let mut rest = text.trim_matches(['"', '\'']);
    while let Some((before, after)) = rest.split_once('$') {
        filled.push_str(before);
        let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        let (inner, behind) = match after.strip_prefix('{') {
            Some(braced) => braced.split_once('}')?,
            None => after.split_at(after.find(|letter| !is_name(letter)).unwrap_or(after.len())),
        };
        let (name, default) = inner.split_once(":-").map_or((inner, None), |(name, text)| (name, Some(text)));
        filled.push_str(known.get(name).map(String::as_str).filter(|text| !text.is_empty()).or(default)?);
        rest = behind;
    }
    Some(filled + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_are_told_from_stages() {
        let arguments = BTreeMap::from([("RELEASE".to_owned(), "13".to_owned())]);
        let text = "# syntax=x\nARG RELEASE=12\nARG SUITE\nARG KIND=slim\nFROM --platform=linux/amd64 debian:$RELEASE-${KIND} AS Build\n\
                    RUN a \\\n# between\n FROM b\nfrom build\nCOPY --from=0 /a /a\nCOPY --from=build /a /a\n\
                    COPY --chown=1 --from=r.example.com/tools:1 /b /b\nFROM x:${SUITE}\nFROM y:${SUITE:-3}\nFROM scratch\n";
        assert_eq!(
            of(text, &arguments).into_iter().collect::<Vec<_>>(),
            ["debian:13-slim", "r.example.com/tools:1", "y:3"]
        );
        assert!(of("", &arguments).is_empty());
    }
}
