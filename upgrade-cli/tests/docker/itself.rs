//! The command inside the container that it replaces.

#![cfg(test)]

use std::process::Command;
use std::time::{Duration, Instant};

use crate::service::Service;

#[test]
fn a_run_outlives_its_own_container_both_ways() {
    let Some(service) = Service::start("itself") else { return };
    let first = service.id();
    let said = service.upgrade_to("2.0.0", |_| {});
    service.await_outcome("committed", &said);
    let second = service.id();
    assert_ne!(first, second);
    assert_eq!(service.inspect("{{.Config.Image}} {{.State.Running}}"), format!("{} true", service.image_of("2.0.0")));

    // The next one is never healthy: the container that began it serves again.
    let said = service.upgrade_to("2.1.0", |_| {});
    service.await_outcome("rolled back", &said);
    assert_eq!(service.id(), second);
    assert_eq!(service.inspect("{{.State.Running}}"), "true");
}

#[test]
fn a_helper_that_is_killed_goes_on() {
    let Some(service) = Service::start("helped") else { return };
    let said = service.upgrade_to("2.0.0", |service| {
        let began = Instant::now();
        let mut killed = 0;
        while killed < 2 && began.elapsed() < Duration::from_secs(30) {
            for helper in service.helpers() {
                // By its own process: a `docker kill` is what somebody asked for, and ends it for good.
                let pid = service.docker(&["inspect", "--format", "{{.State.Pid}}", &helper]);
                if pid != "0" && Command::new("kill").args(["-KILL", &pid]).status().unwrap().success() {
                    killed += 1;
                }
            }
            std::thread::sleep(Duration::from_millis(150));
        }
        assert!(killed > 0, "there was no helper");
    });
    service.await_outcome("committed", &said);
    assert_eq!(service.inspect("{{.Config.Image}} {{.State.Running}}"), format!("{} true", service.image_of("2.0.0")));
}

#[test]
fn a_journal_that_would_end_with_its_container_is_refused_in_the_plan() {
    let Some(service) = Service::start("lost") else { return };
    let pipeline = format!(
        "upgrade: web\nto: 2.0.0\nsteps:\n  - {{ id: web, uses: docker.container, with: {{ name: {}, image: \"{}\", pull: never }} }}\n",
        service.name,
        service.image_of("2.0.0")
    );
    let ask = |pipeline: &str| {
        let script = format!(
            "cat >/tmp/pipeline.yaml <<'END'\n{pipeline}END\nexec upgrade --state-dir /tmp/state plan /tmp/pipeline.yaml"
        );
        let done = service.engine.command(["exec", &service.name, "sh", "-c", &script]).output().unwrap();
        assert!(!done.status.success());
        String::from_utf8_lossy(&done.stderr).into_owned() + &String::from_utf8_lossy(&done.stdout)
    };
    let said = ask(&pipeline);
    assert!(said.contains("it would end with it") && said.contains("handover:"), "{said}");
    let elsewhere = "handover: { state: /tmp/state, command: [upgrade, resume, RUN] }";
    let said = ask(&pipeline.replace("pull: never", &format!("pull: never, {elsewhere}")));
    assert!(said.contains("the journal at /tmp/state is inside container") && said.contains("--volume"), "{said}");
}
