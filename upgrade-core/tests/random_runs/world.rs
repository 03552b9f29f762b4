//! A world of cells that watches how the steps on it are called.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::entry::Entry;
use upgrade_core::error::{CheckError, StepError};
use upgrade_core::journal::{Journal, MemoryJournal};
use upgrade_core::step::{Prepared, Rollback, Step};
use upgrade_core::verdict::Verdict;

/// What a cell reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reads {
    Found,
    Partial,
    Intended,
}

/// How a call goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    Transient,
    Permanent,
    Panic,
    /// Does not return, whatever is signalled.
    Hang,
}

/// Which call goes wrong, and after how much of its work.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fault {
    pub(crate) call: &'static str,
    pub(crate) trouble: Trouble,
    pub(crate) times: u32,
    pub(crate) after: Reads,
}

/// What a step is like.
#[derive(Debug, Clone, Default)]
pub(crate) struct Plan {
    pub(crate) needs: BTreeSet<usize>,
    pub(crate) irreversible: bool,
    pub(crate) unchanged: bool,
    pub(crate) duration_ms: u64,
    pub(crate) faults: Vec<Fault>,
}

#[derive(Debug)]
pub(crate) struct Cell {
    pub(crate) reads: Reads,
    pub(crate) committed: bool,
    /// Put back or given up by the operator.
    pub(crate) resolved: bool,
    leftover: bool,
    busy: bool,
    keys: BTreeMap<String, String>,
}

pub(crate) struct World {
    pub(crate) plans: Vec<Plan>,
    pub(crate) cells: Mutex<Vec<Cell>>,
    faults: Mutex<Vec<Vec<Fault>>>,
    pub(crate) wrong: Mutex<Vec<String>>,
    pub(crate) breached: std::sync::atomic::AtomicBool,
    pub(crate) journal: MemoryJournal,
    pub(crate) max_parallel: usize,
    pub(crate) begun: std::sync::atomic::AtomicU64,
}

impl World {
    pub(crate) fn new(plans: Vec<Plan>, max_parallel: usize) -> Arc<Self> {
        let cell = |plan: &Plan| Cell {
            reads: if plan.unchanged { Reads::Intended } else { Reads::Found },
            committed: false,
            resolved: false,
            leftover: false,
            busy: false,
            keys: BTreeMap::new(),
        };
        Arc::new(Self {
            cells: Mutex::new(plans.iter().map(cell).collect()),
            faults: Mutex::new(plans.iter().map(|plan| plan.faults.clone()).collect()),
            plans,
            wrong: Mutex::default(),
            breached: false.into(),
            journal: MemoryJournal::new(),
            max_parallel,
            begun: 0.into(),
        })
    }

    pub(crate) fn cells(&self) -> MutexGuard<'_, Vec<Cell>> {
        self.cells.lock().unwrap()
    }

    pub(crate) fn wrong(&self, what: String) {
        self.wrong.lock().unwrap().push(what);
    }

    /// Takes one seeded fault of a call, if any is left.
    fn trouble(&self, at: usize, call: &str) -> Option<Fault> {
        let mut faults = self.faults.lock().unwrap();
        let fault = faults[at].iter_mut().find(|fault| fault.call == call && fault.times > 0)?;
        fault.times -= 1;
        Some(*fault)
    }

    fn dependents(&self, at: usize) -> impl Iterator<Item = usize> {
        (0..self.plans.len()).filter(move |other| self.plans[*other].needs.contains(&at))
    }
}

/// Marks a call as running; one that is dropped before its end leaves something running.
struct Call<'a> {
    world: &'a World,
    at: usize,
    ended: bool,
}

impl<'a> Call<'a> {
    fn begin(world: &'a World, at: usize, call: &str, cx: &Context) -> Self {
        world.begun.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        let mut cells = world.cells();
        let others = cells.iter().filter(|cell| cell.busy).count();
        let key = cx.key();
        let direction = format!("{:?}", cx.direction());
        let mut wrong = Vec::new();
        if cells[at].busy {
            wrong.push("is called beside itself".to_owned());
        }
        if others >= world.max_parallel {
            wrong.push(format!("runs beside {others} others, more than it may"));
        }
        let pivots = (0..cells.len()).any(|other| cells[other].busy && world.plans[other].irreversible);
        if call == "apply" && others > 0 && (pivots || world.plans[at].irreversible) {
            wrong.push("an irreversible step does not run alone".to_owned());
        }
        if cells[at].leftover && call != "settle" {
            wrong.push("what an interrupted call left running was not ended".to_owned());
        }
        if world.plans[at].unchanged {
            wrong.push("it was unchanged".to_owned());
        }
        if cells[at].keys.entry(direction).or_insert_with(|| key.clone()) != &key {
            wrong.push(format!("its idempotency key became {key}"));
        }
        cells[at].busy = true;
        drop(cells);
        for wrong_thing in wrong {
            world.wrong(format!("{call} of s{at}: {wrong_thing}"));
        }
        Self { world, at, ended: false }
    }

    fn end(mut self) {
        self.ended = true;
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        let mut cells = self.world.cells();
        cells[self.at].busy = false;
        cells[self.at].leftover |= !self.ended;
    }
}

/// Moves one cell from found to intended, and back.
pub(crate) struct Move {
    pub(crate) world: Arc<World>,
    pub(crate) at: usize,
}

impl Move {
    fn put(&self, reads: Reads) {
        self.world.cells()[self.at].reads = reads;
    }

    /// Works towards `goal`; a seeded fault strikes where it says.
    async fn work(&self, call: &'static str, goal: Reads) -> Result<(), StepError> {
        let fault = self.world.trouble(self.at, call);
        let pause = Duration::from_millis(self.world.plans[self.at].duration_ms);
        let strike = |fault: Fault| async move {
            match fault.trouble {
                Trouble::Transient => Err(StepError::transient("seeded, passes")),
                Trouble::Permanent => Err(StepError::permanent("seeded, stays")),
                Trouble::Panic => std::panic::resume_unwind(Box::new("seeded")),
                Trouble::Hang => std::future::pending().await,
            }
        };
        if let Some(fault) = fault.filter(|fault| fault.after == Reads::Found) {
            return strike(fault).await;
        }
        self.put(Reads::Partial);
        tokio::time::sleep(pause).await;
        if let Some(fault) = fault.filter(|fault| fault.after == Reads::Partial) {
            return strike(fault).await;
        }
        self.put(goal);
        match fault {
            Some(fault) => strike(fault).await,
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Step for Move {
    const KIND: &'static str = "cell.move";
    type Undo = Reads;
    type Output = usize;

    async fn prepare(&self, _cx: &Context) -> Result<Prepared<Reads, usize>, StepError> {
        let reads = self.world.cells()[self.at].reads;
        if reads == Reads::Intended {
            return Ok(Prepared::unchanged(self.at, "it is there"));
        }
        for needs in &self.world.plans[self.at].needs {
            if self.world.cells()[*needs].reads != Reads::Intended {
                self.world.wrong(format!("prepare of s{}: s{needs}, which it needs, is not applied", self.at));
            }
        }
        if let Some(fault) = self.world.trouble(self.at, "prepare") {
            return Err(match fault.trouble {
                Trouble::Transient => StepError::transient("seeded, passes"),
                _ => StepError::permanent("seeded, stays"),
            });
        }
        Ok(Prepared::change(reads, []))
    }

    async fn apply(&self, cx: &Context, undo: &Reads) -> Result<usize, StepError> {
        let call = Call::begin(&self.world, self.at, "apply", cx);
        let records = self.world.journal.load(cx.run()).await.unwrap();
        let durable =
            |entry: &Entry| matches!(entry, Entry::StepPrepared { step, .. } if step.as_str() == cx.subject());
        if *undo != Reads::Found || !records.iter().any(|record| durable(&record.entry)) {
            self.world.wrong(format!("apply of s{}: its undo record is not durable", self.at));
        }
        let result = self.work("apply", Reads::Intended).await;
        call.end();
        result.map(|()| self.at)
    }

    async fn settle(&self, cx: &Context, _undo: &Reads) -> Result<(), StepError> {
        Call::begin(&self.world, self.at, "settle", cx).end();
        self.world.cells()[self.at].leftover = false;
        Ok(())
    }

    async fn commit(&self, cx: &Context, _undo: &Reads) -> Result<(), StepError> {
        let call = Call::begin(&self.world, self.at, "commit", cx);
        let result = match self.world.trouble(self.at, "commit") {
            Some(_) => Err(StepError::transient("seeded")),
            None => Ok(()),
        };
        self.world.cells()[self.at].committed |= result.is_ok();
        call.end();
        result
    }
}

#[async_trait]
impl Rollback for Move {
    async fn rollback(&self, cx: &Context, undo: &Reads, _output: Option<&usize>) -> Result<(), StepError> {
        let call = Call::begin(&self.world, self.at, "rollback", cx);
        let mut wrong = Vec::new();
        for later in self.world.dependents(self.at) {
            let (cell, plan) = (&self.world.cells()[later], &self.world.plans[later]);
            if cell.reads != Reads::Found && !cell.resolved && !plan.unchanged {
                wrong.push(format!("s{later}, which needs it, is not back"));
            }
        }
        if self.world.cells()[self.at].committed {
            wrong.push("it was committed".to_owned());
        }
        for wrong_thing in wrong {
            self.world.wrong(format!("rollback of s{}: {wrong_thing}", self.at));
        }
        let result = self.work("rollback", *undo).await;
        call.end();
        result
    }
}

/// Breaches when the case says so.
pub(crate) struct Alarm(pub(crate) Arc<World>);

#[async_trait]
impl Check for Alarm {
    async fn check(&self, _cx: &Context) -> Result<Verdict, CheckError> {
        Ok(match self.0.breached.load(std::sync::atomic::Ordering::SeqCst) {
            true => Verdict::fail("seeded"),
            false => Verdict::pass("well"),
        })
    }
}
