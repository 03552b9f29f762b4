//! What changed between two documents, path by path, with the values found masked.

use serde_json::Value;

use super::path::{ConfigPath, Segment};
use super::rules::Rule;
use super::value::ConfigValue;
use crate::files::masked_diff::MASK;

/// Lists the places whose value changed, each with what it was and what it is.
fn changes<'a>(
    before: Option<&'a Value>,
    after: Option<&'a Value>,
    place: &mut Vec<Segment>,
    into: &mut Vec<(ConfigPath, Option<&'a Value>, Option<&'a Value>)>,
) {
    if before == after {
        return;
    }
    match (before, after) {
        (Some(Value::Object(old)), Some(Value::Object(new))) => {
            let added = new.keys().filter(|key| !old.contains_key(*key));
            for key in old.keys().chain(added) {
                place.push(Segment::Key(key.clone()));
                changes(old.get(key), new.get(key), place, into);
                place.pop();
            }
        }
        (Some(Value::Array(old)), Some(Value::Array(new))) => {
            for index in 0..old.len().max(new.len()) {
                place.push(Segment::Index(index));
                changes(old.get(index), new.get(index), place, into);
                place.pop();
            }
        }
        _ => into.push((ConfigPath::of(place.clone()), before, after)),
    }
}

/// Lists the paths whose value changed.
pub(crate) fn changed_paths(before: &Value, after: &Value) -> Vec<String> {
    let mut changed = Vec::new();
    changes(Some(before), Some(after), &mut Vec::new(), &mut changed);
    changed.into_iter().map(|(path, ..)| path.to_string()).collect()
}

/// Writes the difference, a line a place. A value is shown only where a rule spells it out.
pub(crate) fn diff(before: &Value, after: &Value, renamed: &[(ConfigPath, ConfigPath)], rules: &[Rule]) -> String {
    let spelled: Vec<(&ConfigPath, &Value)> = rules
        .iter()
        .filter_map(|rule| match rule {
            Rule::Set(assignment) | Rule::Default(assignment) => match &assignment.value {
                ConfigValue::Literal(value) => Some((&assignment.path, value)),
                ConfigValue::Secret(_) => None,
            },
            _ => None,
        })
        .collect();
    let mut changed = Vec::new();
    changes(Some(before), Some(after), &mut Vec::new(), &mut changed);
    let mut text = String::new();
    for (path, old, new) in &changed {
        let shown = |value: &Value| shown(path, value, &spelled);
        let source = renamed.iter().find(|(to, _)| to == path).map(|(_, from)| from);
        let gone = renamed.iter().any(|(to, from)| from == path && to.get(after).is_some());
        let line = match (old, new, source) {
            (None, Some(new), Some(from)) => format!("~ {path}: {} (was {from})", shown(new)),
            (None, Some(new), None) => format!("+ {path}: {}", shown(new)),
            (Some(_), None, _) if gone => continue,
            (Some(_), None, _) => format!("- {path}: {MASK}"),
            (_, Some(new), _) => format!("~ {path}: {MASK} → {}", shown(new)),
            (None, None, _) => continue,
        };
        text.push_str(&line);
        text.push('\n');
    }
    text
}

/// Shows a value that a rule spells out for just this place; masks any other.
fn shown(path: &ConfigPath, value: &Value, spelled: &[(&ConfigPath, &Value)]) -> String {
    let at_place = |rule: &ConfigPath| {
        let (rule, path) = (rule.segments(), path.segments());
        let same = |(of_rule, of_path): (&Segment, &Segment)| match (of_rule, of_path) {
            (Segment::Every, Segment::Index(_)) => true,
            (of_rule, of_path) => of_rule == of_path,
        };
        rule.len() >= path.len() && rule.iter().zip(path).all(same)
    };
    // A rule may make objects on its way: then what is new here is the value within them.
    let is_spelled = spelled.iter().any(|(rule, literal)| {
        at_place(rule)
            && rule.segments().get(path.segments().len()..).is_some_and(|rest| {
                let mut inner = value;
                for segment in rest {
                    match (inner, segment) {
                        (Value::Object(map), Segment::Key(key)) if map.len() == 1 => match map.get(key) {
                            Some(next) => inner = next,
                            None => return false,
                        },
                        _ => return false,
                    }
                }
                inner == *literal
                    || matches!((inner, literal), (Value::String(t), l) if !l.is_string() && *t == l.to_string())
            })
    });
    if is_spelled { value.to_string() } else { MASK.to_owned() }
}
