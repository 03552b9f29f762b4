//! Undo records that are kept as files: what a run wrote must be read by every later version.

#![cfg(test)]

use std::path::Path;

use serde_json::Value;
use upgrade_core::step::Step;
use upgrade_k8s::steps::{
    Apply, Backup, BlueGreen, Canary, ConfigStep, Exec, HelmStep, NodeStep, Restore, RolloutStep, Scale,
};

fn is_read<S: Step>() {
    let name = format!("{}.undo.v1.json", S::KIND);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(&name);
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let undo = S::read_undo(1, golden.clone()).unwrap();
    assert_eq!(serde_json::to_value(undo).unwrap(), golden, "{name}");
    assert!(S::read_undo(2, golden).is_err(), "{name}");
}

#[test]
fn undo_records_of_every_format_are_read() {
    is_read::<Apply>();
    is_read::<Backup>();
    is_read::<BlueGreen>();
    is_read::<Canary>();
    is_read::<ConfigStep>();
    is_read::<Exec>();
    is_read::<HelmStep>();
    is_read::<NodeStep>();
    is_read::<Restore>();
    is_read::<RolloutStep>();
    is_read::<Scale>();
}
