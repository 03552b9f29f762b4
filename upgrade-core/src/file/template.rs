//! Texts that refer to values: `notes-${to}.tar.gz`.
//!
//! `$${` stands for `${` itself. In front of a brace two dollars are one, so that every text can
//! be written: an odd one left over starts a reference. Elsewhere a dollar is a dollar.

use std::ops::Range;

use serde_json::Value;

/// Holds one part of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Part<'a> {
    Text(String),
    /// What stands between the braces, and where.
    Reference(&'a str, Range<usize>),
}

/// Splits a text into its parts.
///
/// # Errors
/// A brace is not closed; the range is where it was opened.
pub(super) fn parts(text: &str) -> Result<Vec<Part<'_>>, Range<usize>> {
    let mut parts = Vec::new();
    let mut literal = String::new();
    let mut at = 0;
    while let Some(found) = text[at..].find('$') {
        literal.push_str(&text[at..at + found]);
        at += found;
        let dollars = text[at..].bytes().take_while(|byte| *byte == b'$').count();
        if !text[at + dollars..].starts_with('{') {
            literal.push_str(&text[at..at + dollars]);
            at += dollars;
            continue;
        }
        literal.push_str(&text[at..at + dollars / 2]);
        at += dollars;
        if dollars % 2 == 0 {
            literal.push('{');
            at += 1;
            continue;
        }
        let start = at - 1;
        let Some(end) = text[at..].find('}').map(|end| at + end) else { return Err(start..at + 1) };
        if !literal.is_empty() {
            parts.push(Part::Text(std::mem::take(&mut literal)));
        }
        parts.push(Part::Reference(text[at + 1..end].trim(), start..end + 1));
        at = end + 1;
    }
    literal.push_str(&text[at..]);
    if !literal.is_empty() || parts.is_empty() {
        parts.push(Part::Text(literal));
    }
    Ok(parts)
}

/// Writes a text so that reading it as a template gives it back.
pub(super) fn escape(text: &str) -> String {
    doubled(text, false)
}

/// As [`escape`], for a text that a reference follows: its last dollars stand before a brace too.
pub(super) fn escape_before_reference(text: &str) -> String {
    doubled(text, true)
}

fn doubled(text: &str, reference_follows: bool) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        let dollars = rest[at..].bytes().take_while(|byte| *byte == b'$').count();
        let after = &rest[at + dollars..];
        out.push_str(&rest[..at + dollars]);
        if after.starts_with('{') || (after.is_empty() && reference_follows) {
            out.push_str(&rest[at..at + dollars]);
        }
        rest = after;
    }
    out + rest
}

/// Names an output of a step: `steps.backup.output.path`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OutputRef<'a> {
    pub(super) step: &'a str,
    pub(super) path: Vec<&'a str>,
}

impl<'a> OutputRef<'a> {
    /// Reads what stands between the braces; `None` if it does not name an output.
    pub(super) fn read(expression: &'a str) -> Option<Self> {
        let rest = expression.strip_prefix("steps.")?;
        // A step's name may hold dots: the first `.output` that ends a part ends the name.
        let (step, path) = match rest.split_once(".output.") {
            Some((step, path)) => (step, path.split('.').collect()),
            None => (rest.strip_suffix(".output")?, Vec::new()),
        };
        let well_formed = !step.is_empty() && path.iter().all(|part: &&str| !part.is_empty());
        well_formed.then_some(Self { step, path })
    }
}

/// Follows a path into a value: keys of mappings, places of lists.
pub(super) fn select<'a>(value: &'a Value, path: &[&str]) -> Option<&'a Value> {
    path.iter().try_fold(value, |value, part| match value {
        Value::Object(map) => map.get(*part),
        Value::Array(items) => items.get(part.parse::<usize>().ok()?),
        _ => None,
    })
}

/// Replaces every reference to an output in a value; a text that is nothing else takes the
/// output with its type.
///
/// # Errors
/// What `find` says about a reference, or that an output cannot stand within a text.
pub(super) fn fill(value: &Value, find: &dyn Fn(&OutputRef<'_>) -> Result<Value, String>) -> Result<Value, String> {
    Ok(match value {
        Value::String(text) => fill_text(text, find)?,
        Value::Array(items) => Value::Array(items.iter().map(|item| fill(item, find)).collect::<Result<_, _>>()?),
        Value::Object(map) => Value::Object(
            map.iter().map(|(key, value)| Ok((key.clone(), fill(value, find)?))).collect::<Result<_, String>>()?,
        ),
        plain => plain.clone(),
    })
}

fn fill_text(text: &str, find: &dyn Fn(&OutputRef<'_>) -> Result<Value, String>) -> Result<Value, String> {
    let parts = parts(text).map_err(|_| format!("`{text}` opens a `${{` and does not close it"))?;
    let lookup = |expression: &str| {
        let output = OutputRef::read(expression).ok_or_else(|| format!("`${{{expression}}}` is not known"))?;
        find(&output)
    };
    if let [Part::Reference(expression, _)] = &parts[..] {
        return lookup(expression);
    }
    let mut out = String::new();
    for part in parts {
        match part {
            Part::Text(text) => out.push_str(&text),
            Part::Reference(expression, _) => {
                out += &plain_text(&lookup(expression)?)
                    .ok_or_else(|| format!("`${{{expression}}}` is a list or a mapping; it cannot stand in a text"))?;
            }
        }
    }
    Ok(Value::String(out))
}

/// Writes a value as part of a text; `None` for what is not plain.
pub(super) fn plain_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(value) => Some(value.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn two_dollars_before_a_brace_are_one() {
        let text = |text: &str| vec![Part::Text(text.to_owned())];
        assert_eq!(parts("$${to} costs $5").unwrap(), text("${to} costs $5"));
        assert_eq!(parts("$$").unwrap(), text("$$"));
        assert_eq!(parts("a$$${ to }").unwrap(), [Part::Text("a$".into()), Part::Reference("to", 3..10)]);
        assert_eq!(parts("a ${to").unwrap_err(), 2..4);
    }

    #[test]
    fn names_of_outputs() {
        let read = |text| OutputRef::read(text).map(|output| (output.step, output.path));
        assert_eq!(read("steps.a.output"), Some(("a", vec![])));
        assert_eq!(read("steps.a.b.output.c.0"), Some(("a.b", vec!["c", "0"])));
        for wrong in ["steps", "steps.a", "steps.a.output.", "steps..output", "steps.output", "to"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn escaped_text_reads_back(text in "[${}a]{0,12}") {
            let escaped = escape(&text);
            prop_assert_eq!(parts(&escaped).unwrap(), vec![Part::Text(text.clone())]);
            let followed = format!("{}${{x}}", escape_before_reference(&text));
            let read = parts(&followed).unwrap();
            let Some((Part::Reference("x", _), before)) = read.split_last() else { panic!("{read:?}") };
            let before: String =
                before.iter().map(|part| match part { Part::Text(text) => text.as_str(), _ => "?" }).collect();
            prop_assert_eq!(before, text);
        }
    }
}
