//! `docker.compose` on real projects: what is replaced, what is left alone, what is put back.

#![cfg(test)]

use std::fs;

use serde_json::{Value, json};
use upgrade_core::error::Class;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_testbed::docker::{self, Image};

use crate::stack::{Stack, quick, shop, undo};

#[tokio::test]
async fn one_service_gets_another_image_and_back() {
    let Some(stack) = shop("one") else { return };
    let (before, ids) = (stack.picture(), stack.ids());
    let step = stack.step(&json!({ "images": { "web": "PREFIX-web:2" }, "health": { "web": quick() } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    assert_eq!(stack.picture(), before, "prepare changes nothing");
    let record = serde_json::to_string(&found).unwrap();
    assert!(!record.contains("secret-of-db"), "{record}");
    let output = step.apply(&test.forward(), &found).await.unwrap();
    assert_eq!(output.services["web"].image_id, stack.tag("web:2"));
    let after = stack.ids();
    assert_eq!(after["db_1"], ids["db_1"], "the other service is left alone");
    assert_ne!(after["web_1"], ids["web_1"]);
    stack.compose(&["up", "--detach"]);
    assert_eq!(stack.ids(), after, "Compose finds nothing to do");

    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(stack.picture(), before);
    let back = stack.ids();
    stack.compose(&["up", "--detach"]);
    assert_eq!(stack.ids(), back, "Compose finds nothing to do");
    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(stack.ids(), back, "a second undo changes nothing");
}

#[tokio::test]
async fn what_is_up_to_date_is_left_alone() {
    let Some(stack) = shop("done") else { return };
    for with in [json!({}), json!({ "services": ["web"] })] {
        let prepared = stack.step(&with).prepare(&TestContext::new("stack").forward()).await.unwrap();
        assert!(matches!(prepared, Prepared::Unchanged { .. }), "{with}: {prepared:?}");
    }
    let step = stack.step(&json!({ "images": { "web": "PREFIX-web:2" }, "health": { "web": quick() } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    step.apply(&test.forward(), &found).await.unwrap();
    step.commit(&test.commit(), &found).await.unwrap();
    step.commit(&test.commit(), &found).await.unwrap();
    let prepared = step.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(prepared, Prepared::Unchanged { .. }), "{prepared:?}");
    let mine = stack.corner.engine.docker(["image", "ls", "--no-trunc", "--format", "{{.Repository}} {{.ID}}"]);
    assert!(!mine.contains(&format!("upgrade-kept {}", stack.tag("web:1"))), "{mine}");
}

const MANY: &str = r#"
services:
  web:
    image: "PREFIX-web:1"
    scale: 3
  job:
    image: "PREFIX-job:${TAG}"
    volumes: ["/data"]
"#;

fn many(what: &str) -> Option<Stack> {
    let stack = Stack::shared(what, MANY)?;
    for tag in ["1", "2"] {
        stack.image(&Image::web(tag), &format!("web:{tag}"));
        stack.image(&Image::shell("exec sleep 1000").with(&format!("ENV V={tag}")), &format!("job:{tag}"));
    }
    stack.image(&Image::shell("echo cannot open the ledger; exit 3"), "web:bad");
    stack.write(".env", "# ours\nTAG=1\n");
    stack.compose(&["up", "--detach"]);
    Some(stack)
}

#[tokio::test]
async fn replicas_are_replaced_one_by_one_and_their_numbers_come_back() {
    let Some(stack) = many("many") else { return };
    let before = stack.picture();
    let step = stack.step(&json!({ "images": { "web": "PREFIX-web:2" }, "health": { "web": quick() } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    let output = step.apply(&test.forward(), &found).await.unwrap();
    let names = |stack: &Stack| stack.ids().into_keys().filter(|name| name.starts_with("web")).collect::<Vec<_>>();
    assert_eq!(names(&stack), ["web_3", "web_4", "web_5"], "Compose counts on");
    assert_eq!(output.services["web"].containers.len(), 3);
    let after = stack.ids();
    stack.compose(&["up", "--detach"]);
    assert_eq!(stack.ids(), after, "Compose finds nothing to do");
    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(stack.picture(), before);
}

#[tokio::test]
async fn a_roll_that_fails_in_the_middle_leaves_the_other_replicas_alone() {
    let Some(stack) = many("middle") else { return };
    let (before, ids) = (stack.picture(), stack.ids());
    let step = stack.step(&json!({ "images": { "web": "PREFIX-web:bad" }, "health": { "web": quick() } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    let error = step.apply(&test.forward(), &found).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent, "{error:?}");
    assert!(
        error.message().starts_with("service web: container ") && error.message().contains("exited with 3"),
        "{error:?}"
    );
    assert!(error.detail().unwrap().contains("cannot open the ledger"), "{error:?}");
    let now = stack.ids();
    assert_eq!((&now["web_1"], &now["web_2"]), (&ids["web_1"], &ids["web_2"]));
    step.rollback(&test.back(), &found, None).await.unwrap();
    assert_eq!(stack.picture(), before);
    let back = stack.ids();
    assert_eq!((&back["web_1"], &back["web_2"]), (&ids["web_1"], &ids["web_2"]));
}

#[tokio::test]
async fn a_variable_changes_what_it_changes_and_volumes_are_carried_over() {
    let Some(stack) = many("variable") else { return };
    let (before, ids) = (stack.picture(), stack.ids());
    let volumes = |stack: &Stack| stack.containers()["job_1"]["mounts"].clone();
    let data = volumes(&stack);
    let step = stack.step(&json!({ "env": { "TAG": "2" }, "health": { "job": quick() } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    assert_eq!(stack.picture(), before);
    let output = step.apply(&test.forward(), &found).await.unwrap();
    assert_eq!(output.services.keys().collect::<Vec<_>>(), ["job"]);
    assert_eq!(fs::read_to_string(stack.path(".env")).unwrap(), "# ours\nTAG=2\n");
    assert_eq!(stack.containers()["job_1"]["image"], stack.tag("job:2").as_str());
    assert_eq!(volumes(&stack), data);
    assert_eq!(stack.ids()["web_1"], ids["web_1"]);
    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(stack.picture(), before);
}

#[tokio::test]
async fn what_was_stopped_stays_stopped_both_ways() {
    let Some(stack) = shop("stopped") else { return };
    stack.compose(&["stop", "--timeout", "1", "web"]);
    let before = stack.picture();
    let step = stack.step(&json!({ "images": { "web": "PREFIX-web:2" } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    let output = step.apply(&test.forward(), &found).await.unwrap();
    let web = &stack.containers()["web_1"];
    assert_eq!((&web["running"], &web["image"]), (&json!(false), &json!(stack.tag("web:2"))));
    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(stack.picture(), before);
}

#[tokio::test]
async fn a_tag_that_moved_names_the_old_image_again() {
    let (Some(stack), Some(registry)) = (Stack::shared("moved", "services: {}"), docker::registry(false)) else {
        return;
    };
    let engine = &stack.corner.engine;
    let name = format!("{}/{}:latest", registry.address(), stack.corner.prefix);
    let new = Image::web("2").build(engine, &name);
    engine.docker(["push", "--quiet", &name]);
    engine.docker(["image", "rm", &name]);
    let old = Image::web("1").build(engine, &name);
    stack.write("docker-compose.yml", &format!("services:\n  web:\n    image: {name}\n"));
    stack.compose(&["up", "--detach"]);
    let (before, picture) = (stack.containers(), stack.picture());
    let step = stack.step(&json!({ "pull": "always", "health": { "web": quick() } }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    let output = step.apply(&test.forward(), &found).await.unwrap();
    assert_eq!(stack.containers()["web_1"]["image"], new.as_str());
    let prepared = step.prepare(&TestContext::new("again").forward()).await.unwrap();
    assert!(matches!(prepared, Prepared::Unchanged { .. }), "{prepared:?}");
    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(stack.containers(), before);
    assert_eq!(engine.docker(["image", "inspect", "--format", "{{.Id}}", &name]), old);
    assert_eq!(stack.picture(), picture);
    let ids = stack.ids();
    stack.compose(&["up", "--detach"]);
    assert_eq!(stack.ids(), ids, "Compose finds nothing to do");
    engine.docker(["rm", "--force", &ids["web_1"]]);
    engine.docker(["image", "rm", "--force", &name, &new]);
}

#[tokio::test]
async fn jobs_end_first_and_what_lives_in_another_container_moves_with_it() {
    let file = "services:\n  seed:\n    image: PREFIX-seed:1\n  web:\n    image: PREFIX-web:1\n    depends_on:\n      \
                seed: { condition: service_completed_successfully }\n  side:\n    image: PREFIX-web:1\n    \
                command: [sleep, \"1000\"]\n    network_mode: \"service:web\"\n";
    let Some(stack) = Stack::shared("order", file) else { return };
    for (name, script) in
        [("seed:1", "true"), ("seed:2", "sleep 0.5; echo seeded"), ("seed:bad", "echo no table; exit 4")]
    {
        stack.image(&Image::shell(script), name);
    }
    stack.image(&Image::web("1"), "web:1");
    stack.image(&Image::web("2"), "web:2");
    stack.compose(&["up", "--detach"]);
    // What lives in another container carries its id in its hash.
    let seen = |stack: &Stack| {
        let mut all = stack.containers();
        all.values_mut().for_each(|container| container["hash"] = Value::Null);
        all
    };
    let (before, ids) = (seen(&stack), stack.ids());
    let with = |seed: &str| json!({ "images": { "seed": seed, "web": "PREFIX-web:2" }, "health": { "web": quick(), "side": quick() } });
    let (step, test) = (stack.step(&with("PREFIX-seed:bad")), TestContext::new("stack"));
    let found = undo(&step, &test).await;
    let error = step.apply(&test.forward(), &found).await.unwrap_err();
    assert!(error.message().contains("service seed: job ") && error.message().contains("exited with 4"), "{error:?}");
    assert!(error.detail().unwrap().contains("no table"), "{error:?}");
    assert_eq!(stack.ids()["web_1"], ids["web_1"], "what waits for the job is not touched");
    step.rollback(&test.back(), &found, None).await.unwrap();
    assert_eq!(seen(&stack), before);

    let (step, test) = (stack.step(&with("PREFIX-seed:2")), TestContext::new("stack"));
    let found = undo(&step, &test).await;
    let output = step.apply(&test.forward(), &found).await.unwrap();
    assert_eq!(output.services.keys().collect::<Vec<_>>(), ["seed", "side", "web"]);
    let engine = &stack.corner.engine;
    let network = |stack: &Stack| {
        let now = stack.ids();
        let mode = engine.docker(["inspect", "--format", "{{.HostConfig.NetworkMode}}", &now["side_1"]]);
        assert_eq!(mode, format!("container:{}", now["web_1"]));
    };
    network(&stack);
    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(seen(&stack), before);
    network(&stack);
}

#[tokio::test]
async fn services_that_do_not_wait_for_each_other_are_taken_together() {
    // The next two serve only once both are there; what needs them finds them both.
    let file = "services:\n  one:\n    image: PREFIX-meet:${TAG}\n    network_mode: none\n    \
                environment: { WHO: one }\n    volumes: [\"data:/data\"]\n  two:\n    image: PREFIX-meet:${TAG}\n    \
                network_mode: none\n    environment: { WHO: two }\n    volumes: [\"data:/data\"]\n  last:\n    \
                image: PREFIX-last:${TAG}\n    network_mode: none\n    volumes: [\"data:/data\"]\n    \
                depends_on: [one, two]\nvolumes:\n  data: {}\n";
    let Some(stack) = Stack::shared("together", file) else { return };
    let both = "test -f /data/one && test -f /data/two";
    let meet = format!("touch /data/$WHO; until {both}; do sleep 0.05; done; echo met; exec sleep 1000");
    for (name, script) in [
        ("meet:1", "exec sleep 1000"),
        ("last:1", "exec sleep 1000"),
        ("meet:2", &meet),
        ("last:2", &format!("{both} && echo met && exec sleep 1000")),
    ] {
        stack.image(&Image::shell(script), name);
    }
    stack.write(".env", "TAG=1\n");
    stack.compose(&["up", "--detach"]);
    let before = stack.picture();
    let gate = json!({ "log": "met", "stable": "0s", "every": "50ms", "within": "10s" });
    let step = stack.step(&json!({
        "env": { "TAG": "2" }, "health": { "one": gate, "two": gate, "last": gate },
    }));
    let test = TestContext::new("stack");
    let found = undo(&step, &test).await;
    let output = step.apply(&test.forward(), &found).await.unwrap();
    for service in ["one", "two"] {
        assert_eq!(output.services[service].image_id, stack.tag("meet:2"));
    }
    step.rollback(&test.back(), &found, Some(&output)).await.unwrap();
    assert_eq!(stack.picture(), before);
}
