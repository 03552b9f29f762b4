//! The checks and guards of a file.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::deferred::DeferredCheck;
use super::document::{CheckItem, GuardItem};
use super::error::Mistake;
use super::nearest;
use super::node::{Node, Place};
use super::reader::Reader;
use crate::check::Check;
use crate::names::CheckId;
use crate::pipeline::{Builder, CheckOptions, GuardOptions};

/// The steps of the file, and those of them whose outputs may be referred to.
pub(super) type Outputs<'a> = (&'a [String], &'a BTreeSet<String>);

/// Returns where an item is named.
pub(super) fn id_of(node: &Node) -> Place {
    node.get("id").or_else(|| node.get("uses")).map_or_else(|| node.place.clone(), |id| id.place.clone())
}

impl Reader<'_> {
    /// Reads a list of checks.
    pub(super) fn checks(
        &mut self,
        document: &Node,
        name: &str,
        outputs: Option<Outputs<'_>>,
    ) -> Vec<(String, Arc<dyn Check>, CheckOptions)> {
        let mut taken = BTreeSet::new();
        let mut checks = Vec::new();
        for node in self.list(document, name) {
            let deferrable: &[&str] = if outputs.is_some() { &["with"] } else { &[] };
            let Some(item) = self.read::<CheckItem>(node, deferrable) else { continue };
            let id = self.check_id(node, item.id.as_deref(), &item.uses, &mut taken);
            if let (Some(id), Some(check)) = (id, self.any_check(node, outputs)) {
                checks.push((id, check, CheckOptions::default().policy(item.policy())));
            }
        }
        checks
    }

    /// Makes the check that an item names.
    pub(super) fn any_check(&mut self, node: &Node, outputs: Option<Outputs<'_>>) -> Option<Arc<dyn Check>> {
        let registry = self.registry;
        let kind = self.kind(&registry.checks, "check", node)?;
        let (Some((ids, earlier)), Some(with)) = (outputs, node.get("with").filter(|with| with.deferred().is_some()))
        else {
            return self.make(kind, node);
        };
        self.outputs(with, ids, earlier, "the check");
        self.probe(kind, node);
        let name = node.get("uses")?.text()?.to_owned();
        Some(Arc::new(DeferredCheck { name, make: kind.make.clone(), with: with.canonical(), cx: self.cx.clone() }))
    }

    /// Names a check: by its id, else by its kind, with a number from the second on.
    fn check_id(&mut self, node: &Node, id: Option<&str>, uses: &str, taken: &mut BTreeSet<String>) -> Option<String> {
        let name = match id {
            Some(id) => id.to_owned(),
            None => {
                let numbered = (2..).map(|number| format!("{uses}-{number}"));
                std::iter::once(uses.to_owned()).chain(numbered).find(|name| !taken.contains(name))?
            }
        };
        if let Err(error) = CheckId::try_from(name.as_str()) {
            // A kind that is no name is no kind either, which is told when it is looked up.
            if id.is_some() {
                self.wrong(Mistake::new(error.to_string(), id_of(node)));
                return None;
            }
        }
        if !taken.insert(name.clone()) {
            self.wrong(Mistake::new(format!("two checks here are called `{name}`"), id_of(node)));
            return None;
        }
        Some(name)
    }

    /// Adds the guards of a file to a pipeline.
    pub(super) fn guards(&mut self, document: &Node, mut builder: Builder, steps: &[String]) -> Builder {
        let mut taken = BTreeSet::new();
        for node in self.list(document, "guards") {
            let Some(item) = self.read::<GuardItem>(node, &[]) else { continue };
            let id = self.check_id(node, item.id.as_deref(), &item.uses, &mut taken);
            let mut options = GuardOptions::default().check(CheckOptions::default().policy(item.policy()));
            if let Some(from) = item.from {
                self.guard_step(node, "from", &from, steps);
                options = options.from(from);
            }
            if let Some(until) = item.until.filter(|until| until != "commit") {
                self.guard_step(node, "until", &until, steps);
                options = options.until(until);
            }
            for step in item.pause_during.into_iter().flat_map(super::document::Names::into_vec) {
                self.guard_step(node, "pause_during", &step, steps);
                options = options.pause_during(step);
            }
            if let Some(every) = item.every {
                if every.0.is_zero() {
                    let place = node.get("every").map_or(0..0, |every| every.place.clone());
                    self.wrong(Mistake::new("a guard cannot measure without a pause", place));
                }
                options = options.every(every);
            }
            if let Some(breach_for) = item.breach_for {
                options = options.breach_for(breach_for);
            }
            options = options.action(item.action.unwrap_or_default());
            if let (Some(id), Some(check)) = (id, self.any_check(node, None)) {
                builder = builder.guard_with(id, check, options);
            }
        }
        builder
    }

    fn guard_step(&mut self, node: &Node, key: &str, step: &str, steps: &[String]) {
        if self.is_full() || steps.iter().any(|known| known == step) {
            return;
        }
        let place = node.get(key).map_or_else(
            || node.place.clone(),
            |found| found.items().iter().find(|item| item.text() == Some(step)).unwrap_or(found).place.clone(),
        );
        let known = steps.iter().map(String::as_str).chain((key == "until").then_some("commit"));
        let help = nearest::help("the steps of this file", step, known.collect::<Vec<_>>());
        self.wrong(Mistake::new(format!("there is no step `{}`", step.escape_debug()), place).with_help(help));
    }
}
