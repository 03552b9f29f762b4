//! What stands on stdout and what on stderr.

use crate::world::World;

#[test]
fn json_output_is_framed_and_holds_nothing_else() {
    let world = World::new();
    world.pipeline("now");
    let ran = world.upgrade(&["run", "upgrade.yaml", "--output", "json"]).exits(0);
    let objects = ran.objects();
    assert_eq!(objects[0]["format"], "upgrade/1");
    assert_eq!(objects[0]["command"], "run");
    let last = objects.last().unwrap();
    assert_eq!((last["outcome"].as_str(), last["exit"].as_i64()), (Some("committed"), Some(0)));
    let records = &objects[1..objects.len() - 1];
    assert_eq!(records[0]["entry"]["type"], "run_created");
    for (seq, record) in records.iter().enumerate() {
        assert_eq!(record["seq"], seq);
        assert_eq!(record["run"], last["run"]);
        assert!(record["digest"].is_string() && record["at"].is_string());
    }
    assert!(records.iter().any(|record| record["entry"]["type"] == "step_applied"));
}

#[test]
fn every_command_ends_its_json_with_an_outcome() {
    let world = World::new();
    world.pipeline("{ confirm_within: 1h }");
    let commands: [(&[&str], &str, i32); 14] = [
        (&["validate", "upgrade.yaml"], "valid", 0),
        (&["validate", "missing.yaml"], "error", 2),
        (&["plan", "upgrade.yaml"], "planned", 0),
        (&["history"], "listed", 0),
        (&["status"], "error", 2),
        (&["run", "upgrade.yaml", "--detach"], "probation", 6),
        (&["run", "upgrade.yaml"], "error", 7),
        (&["status"], "shown", 0),
        (&["rollback"], "rolled_back", 0),
        (&["rollback"], "error", 7),
        (&["history"], "listed", 0),
        (&["audit", "verify"], "whole", 0),
        (&["watch", "--once"], "watched", 0),
        (&["init", "other.yaml"], "written", 0),
    ];
    for (arguments, outcome, exit) in commands {
        let mut arguments = arguments.to_vec();
        arguments.extend(["--output", "json"]);
        let ran = world.upgrade(&arguments).exits(exit);
        let objects = ran.objects();
        let last = objects.last().unwrap();
        assert_eq!(objects[0]["format"], "upgrade/1", "{arguments:?}");
        assert_eq!(
            (last["outcome"].as_str(), last["exit"].as_i64()),
            (Some(outcome), Some(exit.into())),
            "{arguments:?}"
        );
        let outcomes = objects.iter().filter(|object| object.get("outcome").is_some()).count();
        assert_eq!(outcomes, 1, "{arguments:?}");
    }
}

#[test]
fn mistakes_in_a_file_are_data_too() {
    let world = World::new();
    world.write("wrong.yaml", "upgrade: notes\nsetps: []\n");
    let ran = world.upgrade(&["validate", "wrong.yaml", "--output", "json"]).exits(2);
    let last = ran.objects().pop().unwrap();
    assert_eq!(last["mistakes"][0]["line"], 2);
    assert!(ran.stderr.contains("setps"));
}

#[test]
fn the_story_is_on_stderr_and_can_be_silenced() {
    let world = World::new();
    world.pipeline("now");
    let ran = world.upgrade(&["run", "upgrade.yaml"]).exits(0);
    assert_eq!(ran.stdout.lines().count(), 1, "{}", ran.stdout);
    assert!(ran.stderr.contains("kept: applying"), "{}", ran.stderr);
    assert!(!ran.stderr.contains('\x1b') && !ran.stdout.contains('\x1b'), "no terminal, no colours");
    let world = World::new();
    world.pipeline("now");
    let quiet = world.upgrade(&["run", "upgrade.yaml", "--quiet"]).exits(0);
    assert_eq!(quiet.stderr, "");
    assert!(quiet.stdout.contains("is committed"));
}

#[test]
fn a_plan_shows_the_difference_and_takes_what_is_laid_over() {
    let world = World::new();
    world.pipeline("now");
    let ran = world.upgrade(&["plan", "upgrade.yaml", "--to", "v1.2.0", "--var", "text=newer"]).exits(0);
    for line in ["notes → 1.2.0", "- •••", "+ newer", "+ 1.2.0"] {
        assert!(ran.stdout.contains(line), "no `{line}` in {}", ran.stdout);
    }
    world.is_old();
}

#[test]
fn an_error_reads_message_then_hint() {
    let world = World::new();
    let ran = world.upgrade(&["resume"]).exits(2);
    let lines: Vec<_> = ran.stderr.lines().collect();
    assert!(lines[0].starts_with("error: "), "{}", ran.stderr);
    assert!(lines.last().unwrap().starts_with("  hint: "), "{}", ran.stderr);
}
