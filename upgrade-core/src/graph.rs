//! The order of a pipeline's steps: what needs what, as plain data.

use std::collections::{BTreeMap, BTreeSet};

use crate::names::StepId;

/// Holds the steps of a pipeline in an order in which each comes after all that it needs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Graph {
    nodes: BTreeMap<StepId, Node>,
    order: Vec<StepId>,
    /// For each step in order, where it stands among the ids in their own order.
    ranks: Vec<usize>,
    /// For each step in order, the places of what it needs.
    needs: Vec<Vec<usize>>,
    pivot: Option<StepId>,
}

/// Describes one step's place.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Node {
    /// The steps that must be done before this one.
    pub needs: BTreeSet<StepId>,
    /// The steps that need this one.
    pub needed_by: BTreeSet<StepId>,
    /// Whether the step can be undone.
    pub reversible: bool,
}

/// Says why steps have no order.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GraphError {
    /// Two steps have the same id.
    #[error("two steps are called `{0}`")]
    Twice(StepId),
    /// A step needs one that is not there.
    #[error("step `{step}` needs `{needs}`, which is not a step of this pipeline")]
    Missing {
        /// The step.
        step: StepId,
        /// What it needs.
        needs: StepId,
    },
    /// Steps need each other in a circle.
    #[error("the steps need each other in a circle: {}", .0.iter().map(StepId::as_str).collect::<Vec<_>>().join(" → "))]
    Circle(Vec<StepId>),
}

impl Graph {
    /// Orders steps, given in the order in which they are written: id, needs, reversible.
    ///
    /// # Errors
    /// Two steps share an id, one needs a step that is missing, or they need each other.
    pub fn new(steps: impl IntoIterator<Item = (StepId, BTreeSet<StepId>, bool)>) -> Result<Self, GraphError> {
        let mut nodes: BTreeMap<StepId, Node> = BTreeMap::new();
        let mut written = Vec::new();
        for (id, needs, reversible) in steps {
            written.push(id.clone());
            if nodes.insert(id.clone(), Node { needs, needed_by: BTreeSet::new(), reversible }).is_some() {
                return Err(GraphError::Twice(id));
            }
        }
        for id in &written {
            for needs in nodes[id].needs.clone() {
                match nodes.get_mut(&needs) {
                    Some(node) => {
                        node.needed_by.insert(id.clone());
                    }
                    None => return Err(GraphError::Missing { step: id.clone(), needs }),
                }
            }
        }
        let order = order(&written, &nodes)?;
        let ranks: BTreeMap<&StepId, usize> = nodes.keys().zip(0..).collect();
        let places: BTreeMap<&StepId, usize> = order.iter().zip(0..).collect();
        Ok(Self {
            ranks: order.iter().map(|id| ranks[id]).collect(),
            needs: order.iter().map(|id| nodes[id].needs.iter().map(|needs| places[needs]).collect()).collect(),
            pivot: order.iter().find(|id| !nodes[*id].reversible).cloned(),
            nodes,
            order,
        })
    }

    /// Lists the steps, each after all that it needs, otherwise as written.
    pub fn order(&self) -> &[StepId] {
        &self.order
    }

    /// Returns a step's place.
    pub fn node(&self, step: &StepId) -> Option<&Node> {
        self.nodes.get(step)
    }

    /// Lists what a step needs directly; nothing for an unknown step.
    pub fn needs(&self, step: &StepId) -> impl Iterator<Item = &StepId> {
        self.nodes.get(step).into_iter().flat_map(|node| &node.needs)
    }

    /// Lists what needs a step directly; nothing for an unknown step.
    pub fn needed_by(&self, step: &StepId) -> impl Iterator<Item = &StepId> {
        self.nodes.get(step).into_iter().flat_map(|node| &node.needed_by)
    }

    /// Collects all that a step needs, directly or through others.
    pub fn all_needs(&self, step: &StepId) -> BTreeSet<StepId> {
        self.reach(step, |node| &node.needs)
    }

    /// Collects all that needs a step, directly or through others.
    pub fn all_needed_by(&self, step: &StepId) -> BTreeSet<StepId> {
        self.reach(step, |node| &node.needed_by)
    }

    /// Returns the first irreversible step in order: the pivot.
    pub fn pivot(&self) -> Option<&StepId> {
        self.pivot.as_ref()
    }

    /// Lists, for each step in order, where it stands among the ids in their own order.
    pub(crate) fn ranks(&self) -> &[usize] {
        &self.ranks
    }

    /// Lists the places, in order, of what the step at a place needs directly.
    pub(crate) fn needs_of(&self, place: usize) -> &[usize] {
        self.needs.get(place).map_or(&[], Vec::as_slice)
    }

    fn reach(&self, step: &StepId, next: impl Fn(&Node) -> &BTreeSet<StepId>) -> BTreeSet<StepId> {
        let mut seen = BTreeSet::new();
        let mut waiting: Vec<&StepId> = self.nodes.get(step).map(&next).into_iter().flatten().collect();
        while let Some(id) = waiting.pop() {
            if seen.insert(id.clone())
                && let Some(node) = self.nodes.get(id)
            {
                waiting.extend(next(node));
            }
        }
        seen
    }
}

fn order(written: &[StepId], nodes: &BTreeMap<StepId, Node>) -> Result<Vec<StepId>, GraphError> {
    let place: BTreeMap<&StepId, usize> = written.iter().enumerate().map(|(at, id)| (id, at)).collect();
    let mut missing: BTreeMap<&StepId, usize> = nodes.iter().map(|(id, node)| (id, node.needs.len())).collect();
    let mut ready: BTreeSet<usize> =
        missing.iter().filter(|(_, count)| **count == 0).filter_map(|(id, _)| place.get(*id).copied()).collect();
    let mut order = Vec::with_capacity(written.len());
    while let Some(at) = ready.pop_first() {
        let id = &written[at];
        order.push(id.clone());
        for next in &nodes[id].needed_by {
            if let Some(count) = missing.get_mut(next) {
                *count -= 1;
                if *count == 0 {
                    ready.extend(place.get(next));
                }
            }
        }
    }
    if order.len() == written.len() { Ok(order) } else { Err(GraphError::Circle(circle(nodes, &order))) }
}

/// Walks backwards from any step that could not be ordered until a step comes again.
fn circle(nodes: &BTreeMap<StepId, Node>, ordered: &[StepId]) -> Vec<StepId> {
    let done: BTreeSet<&StepId> = ordered.iter().collect();
    let mut path: Vec<StepId> = Vec::new();
    let mut at = nodes.keys().find(|id| !done.contains(id));
    while let Some(id) = at {
        if let Some(start) = path.iter().position(|seen| seen == id) {
            path.drain(..start);
            path.push(id.clone());
            path.reverse();
            return path;
        }
        path.push(id.clone());
        at = nodes[id].needs.iter().find(|needs| !done.contains(needs));
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> StepId {
        StepId::try_from(text).unwrap()
    }

    fn graph(steps: &[(&str, &[&str])]) -> Result<Graph, GraphError> {
        Graph::new(steps.iter().map(|(step, needs)| (id(step), needs.iter().map(|n| id(n)).collect(), true)))
    }

    #[test]
    fn orders_as_written_where_it_may() {
        let graph = graph(&[("c", &["a"]), ("b", &[]), ("a", &[])]).unwrap();
        let order: Vec<_> = graph.order().iter().map(StepId::as_str).collect();
        assert_eq!(order, ["b", "a", "c"]);
    }

    #[test]
    fn names_the_circle() {
        let error = graph(&[("x", &[]), ("a", &["c"]), ("b", &["a"]), ("c", &["b"])]).unwrap_err();
        assert_eq!(error.to_string(), "the steps need each other in a circle: a → b → c → a");
    }

    #[test]
    fn names_what_is_missing_or_doubled() {
        assert_eq!(graph(&[("a", &["z"])]).unwrap_err(), GraphError::Missing { step: id("a"), needs: id("z") });
        assert_eq!(graph(&[("a", &[]), ("a", &[])]).unwrap_err(), GraphError::Twice(id("a")));
    }

    #[test]
    fn reaches_through_others() {
        let graph = graph(&[("a", &[]), ("b", &["a"]), ("c", &["b"]), ("d", &[])]).unwrap();
        assert_eq!(graph.all_needed_by(&id("a")), [id("b"), id("c")].into());
        assert_eq!(graph.all_needs(&id("c")), [id("a"), id("b")].into());
    }
}
