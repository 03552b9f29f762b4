//! The suite that every journal passes: what the executor relies on, asked of real storage.
//!
//! ```
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! use std::sync::Arc;
//! use upgrade_core::journal::{MemoryJournal, conformance};
//!
//! let journal = MemoryJournal::new();
//! conformance::all(|| Arc::new(journal.clone())).await;
//! # }
//! ```

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Journal, JournalError, Lease, chain};
use crate::entry::{Definition, Demand, ENTRY_FORMAT, Entry, Header, Record, Request};
use crate::names::{Actor, LockName, PipelineName, RunId, Seq};
use crate::transition::RunState;

type Open<'a> = &'a (dyn Fn() -> Arc<dyn Journal> + Sync);
type Case = for<'a> fn(Open<'a>) -> Pin<Box<dyn Future<Output = ()> + 'a>>;

/// Lists the cases by name.
pub const CASES: &[(&str, Case)] = &[
    ("what was appended is loaded", |open| Box::pin(appended_is_loaded(open))),
    ("an append names the number it expects", |open| Box::pin(sequence_is_checked(open))),
    ("a lease excludes others", |open| Box::pin(leases_exclude(open))),
    ("a lease on a path covers what lies below", |open| Box::pin(paths_overlap(open))),
    ("patience waits for a lease", |open| Box::pin(patience_waits(open))),
    ("one of sixteen takes a lease", |open| Box::pin(one_of_sixteen(open))),
    ("a foreign lease cannot append", |open| Box::pin(foreign_lease(open))),
    ("a list describes the runs", |open| Box::pin(runs_are_listed(open))),
    ("requests wait until they are withdrawn", |open| Box::pin(requests_wait(open))),
    ("sealed contents come back until they are cleared", |open| Box::pin(sealed_contents(open))),
];

/// Runs every case; `open` gives another handle on the same storage each time.
///
/// # Panics
/// The journal does not keep a guarantee.
pub async fn all<J: Journal>(open: impl Fn() -> Arc<J> + Sync) {
    let open = || -> Arc<dyn Journal> { open() };
    for (_, case) in CASES {
        case(&open).await;
    }
}

/// Makes the first entry of a run, for tests.
pub fn created(run: &RunId, pipeline: &str) -> Entry {
    Entry::RunCreated(Box::new(Header {
        format: ENTRY_FORMAT,
        run: run.clone(),
        pipeline: name(pipeline),
        environment: Some("staging".into()),
        from: Some(semver::Version::new(1, 0, 0)),
        to: Some(semver::Version::new(1, 1, 0)),
        locks: vec![lock("target", pipeline)],
        definition: Definition {
            fingerprint: format!("fingerprint of {pipeline}"),
            base_fingerprint: format!("base of {pipeline}"),
            shape: json!({ "steps": ["a", "b"], "share": 0.1 }),
            document: Value::Null,
            base_dir: PathBuf::from("/"),
            variables: [("threshold".to_owned(), json!(0.1234567890123456))].into(),
        },
        actor: Actor { user: "tester".into(), host: "here".into(), pid: 1 },
        engine: "0.1.0".into(),
    }))
}

/// Makes the entry of a run's new state, for tests.
pub fn entered(state: RunState) -> Entry {
    Entry::RunEntered { state, cause: None, deadline: None, health: None }
}

/// Makes an entry of a step, for tests.
pub fn undoing(step: &str) -> Entry {
    Entry::StepUndoing { step: name(step) }
}

fn name<T: TryFrom<String>>(text: &str) -> T {
    match T::try_from(text.to_owned()) {
        Ok(name) => name,
        Err(_) => panic!("`{text}` is a name"),
    }
}

fn lock(namespace: &str, resource: &str) -> LockName {
    name(&format!("{namespace}:{resource}"))
}

/// Names a lock that no other case uses.
fn own_lock() -> LockName {
    lock("conformance", RunId::generate().as_str())
}

#[track_caller]
fn ok<T>(answer: Result<T, JournalError>) -> T {
    match answer {
        Ok(value) => value,
        Err(error) => panic!("{error} ({})", error.hint()),
    }
}

async fn lease(journal: &dyn Journal) -> Lease {
    ok(journal.acquire(&[own_lock()], Duration::ZERO).await)
}

fn check_chain(records: &[Record]) {
    let mut prev = "";
    for (seq, record) in (0..).zip(records) {
        assert_eq!(chain::verify(record, seq, prev), Ok(()), "record {seq}");
        prev = &record.digest;
    }
}

async fn appended_is_loaded(open: Open<'_>) {
    let (journal, reader, run) = (open(), open(), RunId::generate());
    assert!(matches!(journal.load(&run).await, Err(JournalError::NoRun(_))), "there is no run yet");
    let mut expected = Vec::new();
    for session in 0..3 {
        let lease = lease(&*journal).await;
        let start = expected.len() as Seq;
        if session == 0 {
            let first = [created(&run, "loaded"), entered(RunState::Applying)];
            expected.extend(ok(journal.append(&lease, &run, 0, &first).await));
        }
        assert!(ok(journal.append(&lease, &run, expected.len() as Seq, &[]).await).is_empty());
        for step in 0..5 {
            let entries: Vec<_> = (0..=step).map(|step| undoing(&format!("s{step}"))).collect();
            let at = expected.len() as Seq;
            let records = ok(journal.append(&lease, &run, at, &entries).await);
            assert_eq!(
                records.iter().map(|record| &record.entry).collect::<Vec<_>>(),
                entries.iter().collect::<Vec<_>>()
            );
            expected.extend(records);
            assert_eq!(ok(reader.load(&run).await), expected, "read beside the driver");
        }
        assert!(expected.len() as Seq > start);
        drop(lease);
        assert_eq!(ok(reader.load(&run).await), expected, "read at rest");
    }
    check_chain(&expected);
}

async fn sequence_is_checked(open: Open<'_>) {
    let (journal, run) = (open(), RunId::generate());
    let lease = lease(&*journal).await;
    let sequence = |answer: Result<Vec<Record>, JournalError>, wanted: (Seq, Seq)| match answer {
        Err(JournalError::Sequence { expected, actual, .. }) => assert_eq!((expected, actual), wanted),
        other => panic!("a sequence error, not {other:?}"),
    };
    sequence(journal.append(&lease, &run, 1, &[undoing("a")]).await, (1, 0));
    ok(journal.append(&lease, &run, 0, &[created(&run, "sequence")]).await);
    sequence(journal.append(&lease, &run, 0, &[created(&run, "sequence")]).await, (0, 1));
    sequence(journal.append(&lease, &run, 2, &[undoing("a")]).await, (2, 1));
    ok(journal.append(&lease, &run, 1, &[undoing("a")]).await);
    assert_eq!(ok(journal.load(&run).await).len(), 2, "a refused append leaves nothing");
}

async fn leases_exclude(open: Open<'_>) {
    let (one, two) = (open(), open());
    let (a, b, c) = (own_lock(), own_lock(), own_lock());
    let first = ok(one.acquire(&[b.clone(), a.clone(), a.clone()], Duration::ZERO).await);
    let mut sorted = vec![a.clone(), b.clone()];
    sorted.sort();
    assert_eq!(first.locks(), sorted);
    match two.acquire(&[c.clone(), a.clone()], Duration::ZERO).await {
        Err(JournalError::Held { lock, .. }) => assert_eq!(lock, a),
        other => panic!("it is held, not {other:?}"),
    }
    let other = ok(two.acquire(std::slice::from_ref(&c), Duration::ZERO).await);
    ok(first.verify().await);
    ok(other.verify().await);
    let epoch = first.epoch();
    drop(first);
    let next = ok(two.acquire(&[a, b], Duration::ZERO).await);
    assert!(next.epoch() > epoch, "{} > {epoch}", next.epoch());
}

async fn paths_overlap(open: Open<'_>) {
    let (one, two) = (open(), open());
    let root = format!("/conformance-{}", RunId::generate());
    let path = |rest: &str| [lock("path", &format!("{root}{rest}"))];
    let held = |answer: Result<Lease, JournalError>| assert!(matches!(answer, Err(JournalError::Held { .. })));
    let below = ok(one.acquire(&path("/app/current"), Duration::ZERO).await);
    held(two.acquire(&path("/app"), Duration::ZERO).await);
    held(two.acquire(&path(""), Duration::ZERO).await);
    let beside = ok(two.acquire(&path("/app/data"), Duration::ZERO).await);
    drop((below, beside));
    let above = ok(two.acquire(&path("/app"), Duration::ZERO).await);
    held(one.acquire(&path("/app/current"), Duration::ZERO).await);
    ok(one.acquire(&path("/application"), Duration::ZERO).await);
    drop(above);
    let both = [path("/app"), path("/app/current")].concat();
    ok(one.acquire(&both, Duration::ZERO).await);
}

async fn patience_waits(open: Open<'_>) {
    let (one, two, name) = (open(), open(), own_lock());
    let held = ok(one.acquire(std::slice::from_ref(&name), Duration::ZERO).await);
    let start = Instant::now();
    let answer = two.acquire(std::slice::from_ref(&name), Duration::from_millis(120)).await;
    assert!(matches!(answer, Err(JournalError::Held { .. })), "{answer:?}");
    assert!(start.elapsed() >= Duration::from_millis(100), "{:?}", start.elapsed());
    let waiter = async { ok(two.acquire(std::slice::from_ref(&name), Duration::from_secs(10)).await) };
    let releaser = async {
        tokio::time::sleep(Duration::from_millis(60)).await;
        drop(held);
        Instant::now()
    };
    let (lease, released) = tokio::join!(waiter, releaser);
    assert!(released.elapsed() < Duration::from_secs(1), "{:?}", released.elapsed());
    ok(lease.verify().await);
}

async fn one_of_sixteen(open: Open<'_>) {
    let name = own_lock();
    let mut contenders = tokio::task::JoinSet::new();
    for _ in 0..16 {
        let (journal, name) = (open(), name.clone());
        contenders.spawn(async move { journal.acquire(&[name], Duration::ZERO).await });
    }
    let mut leases = Vec::new();
    while let Some(answer) = contenders.join_next().await {
        match answer {
            Ok(Ok(lease)) => leases.push(lease),
            Ok(Err(JournalError::Held { .. })) => {}
            other => panic!("a lease, or it is held: {other:?}"),
        }
    }
    assert_eq!(leases.len(), 1);
}

async fn foreign_lease(open: Open<'_>) {
    let (journal, run) = (open(), RunId::generate());
    let other = super::MemoryJournal::new();
    let lease = ok(other.acquire(&[own_lock()], Duration::ZERO).await);
    let answer = journal.append(&lease, &run, 0, &[created(&run, "foreign")]).await;
    assert!(matches!(answer, Err(JournalError::LeaseLost { .. })), "{answer:?}");
}

async fn runs_are_listed(open: Open<'_>) {
    let (journal, reader) = (open(), open());
    let ways: [(&str, &[RunState]); 4] = [
        ("list-new", &[]),
        ("list-going", &[RunState::Applying]),
        ("list-committed", &[RunState::Applying, RunState::Committing, RunState::Committed]),
        ("list-held", &[RunState::Applying, RunState::Held]),
    ];
    let mut leases = Vec::new();
    let mut made = Vec::new();
    for (pipeline, states) in ways {
        let (run, lease) = (RunId::generate(), lease(&*journal).await);
        let mut records = ok(journal.append(&lease, &run, 0, &[created(&run, pipeline)]).await);
        for state in states {
            records.extend(ok(journal.append(&lease, &run, records.len() as Seq, &[entered(*state)]).await));
        }
        made.push((run, pipeline, states.last().copied().unwrap_or(RunState::Checking), records));
        leases.push(lease);
    }
    // First with the drivers at work, then at rest.
    for _ in 0..2 {
        let runs = ok(reader.runs().await);
        let order: Vec<_> = runs.iter().filter(|run| made.iter().any(|(made, ..)| *made == run.run)).collect();
        assert_eq!(order.len(), made.len());
        for (summary, (run, pipeline, state, records)) in order.into_iter().zip(&made) {
            assert_eq!(summary.run, *run, "oldest first");
            assert_eq!(summary.damage, None);
            assert_eq!(summary.pipeline.as_ref().map(PipelineName::as_str), Some(*pipeline));
            assert_eq!(summary.environment.as_deref(), Some("staging"));
            assert_eq!(summary.to, Some(semver::Version::new(1, 1, 0)));
            assert_eq!(summary.locks, [lock("target", pipeline)]);
            assert_eq!(summary.fingerprint, format!("fingerprint of {pipeline}"));
            assert_eq!(summary.base_fingerprint, format!("base of {pipeline}"));
            assert_eq!(summary.state, Some(*state), "{pipeline}");
            assert_eq!(summary.entries, records.len() as Seq, "{pipeline}");
            assert_eq!(summary.created, records.first().map(|record| record.at));
            assert_eq!(summary.updated, records.last().map(|record| record.at));
        }
        leases.clear();
    }
    let (run, _, _, records) = &made[1];
    let lease = lease(&*journal).await;
    let Entry::RunCreated(header) = created(run, "adopted") else { panic!("a header") };
    let adoption = Entry::DefinitionAdopted {
        definition: Box::new(header.definition),
        difference: Vec::new(),
        actor: Actor::current(),
    };
    ok(journal.append(&lease, run, records.len() as Seq, &[adoption, entered(RunState::Abandoned)]).await);
    let runs = ok(reader.runs().await);
    let adopted = runs.iter().find(|summary| summary.run == *run);
    assert_eq!(adopted.map(|summary| summary.fingerprint.as_str()), Some("fingerprint of adopted"));
    assert_eq!(adopted.and_then(|summary| summary.state), Some(RunState::Abandoned));
}

async fn requests_wait(open: Open<'_>) {
    let (driver, operator, run) = (open(), open(), RunId::generate());
    let stop = |reason: &str| Request::new(Demand::Stop { reason: reason.into() });
    let early = operator.post(&run, &stop("too early")).await;
    assert!(matches!(early, Err(JournalError::NoRun(_))), "{early:?}");
    let lease = lease(&*driver).await;
    ok(driver.append(&lease, &run, 0, &[created(&run, "requests")]).await);
    assert_eq!(ok(driver.requests(&run).await), []);
    let (first, second) = (stop("first"), Request::new(Demand::Resume));
    ok(operator.post(&run, &second).await);
    ok(operator.post(&run, &first).await);
    ok(operator.post(&run, &first).await);
    assert_eq!(ok(driver.requests(&run).await), [first.clone(), second.clone()], "oldest first, each once");
    ok(driver.withdraw(&run, &first.id).await);
    ok(driver.withdraw(&run, &first.id).await);
    ok(driver.withdraw(&run, "../../no such request").await);
    assert_eq!(ok(driver.requests(&run).await), [second]);
}

async fn sealed_contents(open: Open<'_>) {
    let (one, two) = (open(), open());
    let (run, other) = (RunId::generate(), RunId::generate());
    let sealed = ok(one.sealed(&run).await);
    for contents in [b"PASSWORD=x".to_vec(), Vec::new(), vec![0xff; 100_000]] {
        let reference = sealed.put(&contents).await;
        assert_eq!(sealed.put(&contents).await, reference, "put twice");
        let Ok(reference) = reference else { panic!("{reference:?}") };
        assert_eq!(ok(two.sealed(&run).await).get(&reference).await, Ok(contents));
        assert!(ok(two.sealed(&other).await).get(&reference).await.is_err(), "one store a run");
        assert_eq!(ok(two.sealed(&other).await).clear().await, Ok(()));
        assert!(sealed.get(&reference).await.is_ok());
    }
    let kept = sealed.put(b"kept").await;
    assert_eq!(sealed.clear().await, Ok(()));
    assert_eq!(sealed.clear().await, Ok(()), "cleared twice");
    assert!(matches!(kept, Ok(reference) if sealed.get(&reference).await.is_err()));
}
