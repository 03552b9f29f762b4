//! The steps of a file: their order, their configuration, the outputs they refer to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::checks::id_of;
use super::deferred;
use super::document::StepItem;
use super::error::Mistake;
use super::nearest;
use super::node::{Content, Node};
use super::reader::{MAX_MISTAKES, Reader};
use super::template::{self, OutputRef, Part};
use crate::graph::{Graph, GraphError};
use crate::names::StepId;
use crate::pipeline::{Builder, DeferredStep, StepOptions, StepSource, When};
use crate::target::Target;

/// What stands under these may refer to outputs.
const DEFERRABLE: [&str; 4] = ["with", "when", "before", "after"];

/// Adds the steps of a file to a pipeline; returns their ids.
pub(super) fn read(reader: &mut Reader<'_>, document: &Node, mut builder: Builder) -> (Builder, Vec<String>) {
    let mut items: Vec<(&Node, StepItem)> = Vec::new();
    for node in reader.list(document, "steps") {
        let Some(item) = reader.read::<StepItem>(node, &DEFERRABLE) else { continue };
        let place = id_of(node);
        if let Err(error) = StepId::try_from(item.id.as_str()) {
            reader.wrong(Mistake::new(error.to_string(), place));
        } else if items.iter().any(|(_, other)| other.id == item.id) {
            reader.wrong(Mistake::new(format!("two steps are called `{}`", item.id), place));
        } else {
            items.push((node, item));
        }
    }
    let ids: Vec<String> = items.iter().map(|(_, item)| item.id.clone()).collect();
    let needs = needs(reader, &mut items, &ids);
    for (node, item) in items {
        let before = reach(&needs, &item.id);
        let Some((source, options)) = step(reader, node, item, &ids, &before, &needs) else { continue };
        let (id, source) = source;
        builder = builder.source_step(id, source, options);
    }
    (builder, ids)
}

/// Says what each step needs, and tells of names that are no step's.
fn needs(
    reader: &mut Reader<'_>,
    items: &mut [(&Node, StepItem)],
    ids: &[String],
) -> BTreeMap<String, BTreeSet<String>> {
    let mut all = BTreeMap::new();
    let mut previous: Option<String> = None;
    for (node, item) in &mut *items {
        let named = item.needs.take().map(super::document::Names::into_vec);
        if let Some(named) = &named {
            let list = node.get("needs");
            for (at, name) in named.iter().enumerate().filter(|(_, name)| !ids.contains(name)) {
                if reader.is_full() {
                    break;
                }
                let place =
                    list.and_then(|list| list.items().get(at).or(Some(list))).map_or(0..0, |node| node.place.clone());
                let help = nearest::help("the steps of this file", name, ids.iter().map(String::as_str));
                let message = format!("step `{}` needs `{name}`, which is not a step", item.id);
                reader.wrong(Mistake::new(message, place).with_help(help));
            }
        }
        let needs: BTreeSet<String> = match named {
            Some(named) => named.into_iter().filter(|name| ids.contains(name)).collect(),
            None => previous.clone().into_iter().collect(),
        };
        previous = Some(item.id.clone());
        all.insert(item.id.clone(), needs);
    }
    let graph = Graph::new(all.iter().filter_map(|(id, needs)| {
        let needs = needs.iter().filter_map(|name| StepId::try_from(name.as_str()).ok()).collect();
        Some((StepId::try_from(id.as_str()).ok()?, needs, true))
    }));
    if let Err(error) = &graph
        && let GraphError::Circle(circle) = error
    {
        let first = items.iter().find(|(_, item)| circle.iter().any(|id| id.as_str() == item.id));
        let place = first.map_or(0..0, |(node, _)| node.get("needs").map_or_else(|| id_of(node), |n| n.place.clone()));
        reader.wrong(Mistake::new(error.to_string(), place));
    }
    all
}

/// Collects all that a step needs, directly or through others.
fn reach(needs: &BTreeMap<String, BTreeSet<String>>, id: &str) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    let mut waiting: Vec<&String> = needs.get(id).into_iter().flatten().collect();
    while let Some(id) = waiting.pop() {
        if seen.insert(id.clone()) {
            waiting.extend(needs.get(id).into_iter().flatten());
        }
    }
    seen
}

type Made = ((String, StepSource), StepOptions);

fn step(
    reader: &mut Reader<'_>,
    node: &Node,
    item: StepItem,
    ids: &[String],
    earlier: &BTreeSet<String>,
    needs: &BTreeMap<String, BTreeSet<String>>,
) -> Option<Made> {
    let direct = needs.get(&item.id).cloned().unwrap_or_default();
    let mut options = StepOptions::default().policy(item.policy()).needs(direct);
    if let Some(When { text, holds }) = when(reader, node, ids, earlier) {
        options = options.when(text, move |outputs| holds(outputs));
    }
    for (id, check, check_options) in reader.checks(node, "before", Some((ids, earlier))) {
        options = options.before(id, check, check_options);
    }
    let with_itself: BTreeSet<String> = earlier.iter().chain([&item.id]).cloned().collect();
    for (id, check, check_options) in reader.checks(node, "after", Some((ids, &with_itself))) {
        options = options.after(id, check, check_options);
    }
    if let Some(reason) = node.get("irreversible")
        && reason.text().is_some_and(|text| text.trim().is_empty())
    {
        reader.wrong(Mistake::new("`irreversible` gives the reason, and it is empty", reason.place.clone()));
    }
    let registry = reader.registry;
    let kind = reader.kind(&registry.steps, "step", node)?;
    let source = if node.get("with").is_some_and(|with| with.deferred().is_some()) {
        let with = reader.with(node)?;
        reader.outputs(&with, ids, earlier, &format!("step `{}`", item.id));
        // What cannot be made yet counts as reversible; when it turns out otherwise, the run says so.
        let probed = reader.probe(kind, node);
        // What it changes is locked as far as it does not depend on what is only known later.
        let targets = probed.iter().flat_map(|(step, stand_in)| {
            let known = |target: &Arc<dyn Target>| !target.lock().as_str().contains(stand_in);
            step.erased().targets().into_iter().filter(known).collect::<Vec<_>>()
        });
        let targets = targets.collect();
        let probed = probed.and_then(|(step, _)| step.irreversible_reason().map(str::to_owned));
        let irreversible = item.irreversible.or(probed);
        let definition = with.canonical();
        StepSource::Deferred(DeferredStep {
            kind: item.uses,
            targets,
            build: deferred::step(kind, definition.clone(), reader.cx.clone(), irreversible.clone()),
            irreversible,
            definition,
        })
    } else {
        let step = reader.make(kind, node)?;
        StepSource::Ready(match item.irreversible {
            Some(reason) => step.into_irreversible(reason),
            None => step,
        })
    };
    Some(((item.id, source), options))
}

fn when(reader: &mut Reader<'_>, node: &Node, ids: &[String], earlier: &BTreeSet<String>) -> Option<When> {
    let when = node.get("when")?;
    if let Content::Deferred(text) = &when.content {
        reader.outputs(when, ids, earlier, "the condition");
        return Some(deferred::condition(text.clone()));
    }
    match deferred::truth(&when.value()) {
        Some(holds) => Some(deferred::constant(holds)),
        None => {
            reader.wrong(
                Mistake::new("`when` is true or false", when.place.clone())
                    .with_help("or a reference to one: `${name}`, `${steps.ID.output.KEY}`"),
            );
            None
        }
    }
}

impl Reader<'_> {
    /// Tells of references to outputs that will not be there.
    pub(super) fn outputs(&mut self, node: &Node, ids: &[String], earlier: &BTreeSet<String>, who: &str) {
        let mut wrong = Vec::new();
        node.each_deferred(&mut |text, place| {
            for part in template::parts(text).unwrap_or_default() {
                if wrong.len() >= MAX_MISTAKES {
                    return;
                }
                let Part::Reference(expression, _) = part else { continue };
                let Some(OutputRef { step, .. }) = OutputRef::read(expression) else { continue };
                if !ids.iter().any(|id| id == step) {
                    let help = nearest::help("the steps of this file", step, ids.iter().map(String::as_str));
                    wrong.push(Mistake::new(format!("there is no step `{step}`"), place.clone()).with_help(help));
                } else if !earlier.contains(step) {
                    let message = format!("{who} refers to the output of `{step}`, which it does not need");
                    let help = format!("let the step need it: `needs: [{step}]`");
                    wrong.push(Mistake::new(message, place.clone()).with_help(help));
                }
            }
        });
        self.mistakes.extend(wrong);
    }
}
