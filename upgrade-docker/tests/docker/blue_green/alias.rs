//! The switch by names on a network.

use std::process::Stdio;

use serde_json::json;
use upgrade_core::context::OnConflict;
use upgrade_core::error::Class;
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_testbed::docker::Image;

use super::{refused, step, undo};
use crate::world::Corner;

/// Makes a network with a service `web` of version 1.0 and a client on it.
fn service(corner: &Corner) {
    corner.network("front");
    let image = corner.web("1.0");
    let (name, network) = (corner.name("web"), corner.name("front"));
    corner.engine.docker(["run", "--detach", "--name", &name, "--network", &network, "--network-alias", "api", &image]);
    let client = corner.name("client");
    let shell = corner.name("image:client");
    Image::shell("sleep 1000").build(&corner.engine, &shell);
    corner.engine.docker(["run", "--detach", "--name", &client, "--network", &network, &shell]);
}

impl Corner {
    /// Which versions answer to a name, asked `times` times from the client, each time by the name.
    fn answers(&self, name: &str, times: u32) -> Vec<String> {
        let script = format!(
            "for i in $(seq {times}); do busybox timeout 3 wget -qO- http://{name}:8080/version || echo failed; done"
        );
        let all = self.engine.docker(["exec", &self.name("client"), "sh", "-c", &script]);
        let mut versions: Vec<_> = all.lines().map(str::to_owned).collect();
        versions.sort_unstable();
        versions.dedup();
        versions
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_switched_and_given_back_without_a_failed_request() {
    let Some(corner) = Corner::shared("alias") else { return };
    service(&corner);
    let step = step(&corner, &corner.web("2.0"), &json!({ "alias": {} }), &json!({ "drain": "2s" }));
    let test = TestContext::new("web");
    let undo = undo(&step, &test).await;
    // Requests by the name, one after the other, as long as the file is there.
    let script = "touch /go; n=0; while test -e /go; do busybox timeout 3 wget -qO- http://api:8080/version >/dev/null || \
                  echo failed; n=$((n+1)); done; echo $n";
    let mut requests = corner.engine.command(["exec", &corner.name("client"), "sh", "-c", script]);
    let requests = requests.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    step.apply(&test.forward(), &undo).await.unwrap();
    for name in ["api".to_owned(), corner.name("web")] {
        assert_eq!(corner.answers(&name, 5), ["2.0"], "{name}");
    }
    assert_eq!(corner.colours().len(), 2, "{:?}", corner.colours());
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(corner.answers("api", 5), ["1.0"]);
    assert_eq!(corner.colours(), ["web image:1.0 running"]);
    corner.engine.docker(["exec", &corner.name("client"), "rm", "/go"]);
    let done = requests.wait_with_output().unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    println!("{said} requests");
    assert!(!said.contains("failed"), "{said}{}", String::from_utf8_lossy(&done.stderr));
    assert!(said.trim().parse::<u32>().unwrap() > 50, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_upgrade_finds_the_colour_that_serves() {
    let Some(corner) = Corner::shared("colour") else { return };
    service(&corner);
    for (version, colour) in [("2.0", "blue"), ("3.0", "green"), ("4.0", "blue")] {
        let step = step(&corner, &corner.web(version), &json!({ "alias": {} }), &json!({}));
        let test = TestContext::new("web");
        let undo = undo(&step, &test).await;
        let output = step.apply(&test.forward(), &undo).await.unwrap();
        assert_eq!(output.container, corner.name(&format!("web-{colour}")));
        step.commit(&test.commit(), &undo).await.unwrap();
        step.commit(&test.commit(), &undo).await.unwrap();
        assert_eq!(corner.answers(&corner.name("web"), 3), [version]);
        assert_eq!(corner.answers("api", 3), [version]);
        assert_eq!(corner.colours(), [format!("web-{colour} image:{version} running")]);
        let again = step.prepare(&TestContext::new("again").forward()).await.unwrap();
        assert!(matches!(again, Prepared::Unchanged { .. }), "{again:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_address_that_may_be_chosen_is_kept() {
    let Some(corner) = Corner::shared("ipv6") else { return };
    let (old, next, name) = (corner.web("1.0"), corner.web("2.0"), corner.name("web"));
    let addresses = |name: &str| {
        let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.GlobalIPv6Address}}{{end}}";
        corner.engine.docker(["inspect", "--format", format, name])
    };
    for chosen in [true, false] {
        let network = corner.name(if chosen { "both" } else { "half" });
        corner.network_with_ipv6(&network, chosen);
        let alias = ["--network", &network, "--network-alias", "api"];
        corner.engine.docker([&["run", "--detach", "--name", &name][..], &alias, &[&old]].concat());
        let before = addresses(&name);
        assert!(before.contains(" fd"), "{before}");
        let step = step(&corner, &next, &json!({ "alias": {} }), &json!({}));
        let test = TestContext::new("web");
        let undo = undo(&step, &test).await;
        step.apply(&test.forward(), &undo).await.unwrap();
        let after = addresses(&undo_name(&undo));
        let kept = if chosen { before.as_str() } else { before.split_once(' ').unwrap().1 };
        assert!(after.ends_with(kept), "{before}, then {after}");
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert_eq!(corner.colours(), ["web image:1.0 running"]);
        corner.engine.docker(["rm", "--force", &name]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_under_way_is_given_to_its_end() {
    let Some(corner) = Corner::shared("long") else { return };
    corner.network("front");
    let long = "while true; do (for i in $(seq 30); do echo line $i; sleep 0.1; done) | nc -l -p 9000; done";
    let images = ["1.0", "2.0"].map(|version| {
        let name = corner.name(&format!("image:{version}"));
        Image::shell(long).with(&format!("ENV VERSION={version}")).build(&corner.engine, &name);
        name
    });
    let (name, client, network) = (corner.name("web"), corner.name("client"), corner.name("front"));
    let alias = ["--network", &network, "--network-alias", "api"];
    for (name, alias) in [(&name, &alias[..]), (&client, &alias[..2])] {
        corner.engine.docker([&["run", "--detach", "--name", name][..], alias, &[&images[0]]].concat());
    }
    let step = step(&corner, &images[1], &json!({ "alias": {} }), &json!({ "health": { "stable": "0s" } }));
    let test = TestContext::new("web");
    let undo = undo(&step, &test).await;
    // Its input stays open, or nc would take the end of that for the end of all.
    let mut answer = corner.engine.command(["exec", &client, "sh", "-c", "sleep 6 | nc api 9000"]);
    let answer = answer.stdout(Stdio::piped()).spawn().unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    let done = answer.wait_with_output().unwrap();
    let text = String::from_utf8(done.stdout).unwrap();
    assert!(text.ends_with("line 30\n"), "{text}");
    let format = "{{range .NetworkSettings.Networks}}{{.Aliases}}{{end}}";
    let aliases = corner.engine.docker(["inspect", "--format", format, undo_name(&undo).as_str()]);
    assert!(!aliases.contains("api"), "{aliases}");
    step.rollback(&test.back(), &undo, None).await.unwrap();
}

/// The name that the old container has until commit.
fn undo_name(undo: &upgrade_docker::steps::BlueGreenUndo) -> String {
    let undo = serde_json::to_value(undo).unwrap();
    undo["switch"]["alias"]["renamed"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_somebody_else_made_meanwhile_is_left_alone_or_overwritten() {
    let Some(corner) = Corner::shared("foreign") else { return };
    service(&corner);
    let (image, next) = (corner.name("image:1.0"), corner.web("2.0"));
    let (new, old) = (corner.name("web-blue"), corner.name("web"));
    let step = step(&corner, &next, &json!({ "alias": {} }), &json!({}));
    let test = TestContext::new("web");
    let undo = undo(&step, &test).await;
    let foreign = corner.engine.docker(["create", "--name", &new, &image]);
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert_eq!(error.as_conflict().unwrap().present, foreign);
    let error = step.rollback(&test.back(), &undo, None).await.unwrap_err();
    assert_eq!(error.as_conflict().unwrap().subject, format!("container {new}"));
    let test = test.on_conflict(OnConflict::Overwrite);
    step.apply(&test.forward(), &undo).await.unwrap();
    assert_eq!(corner.answers("api", 3), ["2.0"]);
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(corner.colours(), ["web image:1.0 running"]);

    // The old one, replaced by another of its name.
    let test = TestContext::new("web");
    let undo = self::undo(&step, &test).await;
    corner.engine.docker(["rm", "--force", &old]);
    corner.engine.docker(["run", "--detach", "--name", &old, "--network", &corner.name("front"), &image]);
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert_eq!(error.as_conflict().unwrap().subject, format!("container {old}"));
    assert!(step.rollback(&test.back(), &undo, None).await.unwrap_err().as_conflict().is_some());
    assert_eq!(corner.colours(), ["web image:1.0 running"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_and_volumes_are_those_of_the_old_one() {
    let Some(corner) = Corner::shared("same") else { return };
    corner.network("front");
    let images = ["1.0", "2.0"].map(|version| {
        let name = corner.name(&format!("image:{version}"));
        Image::web(version).with("VOLUME /data").build(&corner.engine, &name);
        name
    });
    let (name, network) = (corner.name("web"), corner.name("front"));
    let options = ["--detach", "--network", &network, "--memory", "64m", "--env", "MODE=old", "--env", "LEVEL=3"];
    corner.engine.docker([&["run", "--name", &name][..], &options, &[&images[0]]].concat());
    corner.engine.docker(["exec", &name, "sh", "-c", "echo kept >/data/file"]);
    let env = json!({ "env": { "MODE": "new", "LEVEL": null } });
    let step = step(&corner, &images[1], &json!({ "alias": {} }), &env);
    let volume = |name: &str| {
        let mounts = "{{range .Mounts}}{{.Name}}{{end}} {{.HostConfig.Memory}}";
        corner.engine.docker(["inspect", "--format", mounts, name])
    };
    let before = volume(&name);
    for back in [true, false] {
        let test = TestContext::new("web");
        let undo = undo(&step, &test).await;
        let output = step.apply(&test.forward(), &undo).await.unwrap();
        assert_eq!(volume(&output.container), before);
        let env = corner.engine.docker(["exec", &output.container, "env"]);
        assert!(env.contains("MODE=new\n") && !env.contains("LEVEL") && env.contains("VERSION=2.0"), "{env}");
        let serving = if back { &name } else { &output.container };
        if back {
            step.rollback(&test.back(), &undo, None).await.unwrap();
        } else {
            step.commit(&test.commit(), &undo).await.unwrap();
        }
        assert_eq!(corner.engine.docker(["exec", serving, "cat", "/data/file"]), "kept");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_never_serves_leaves_the_old_one_alone() {
    let Some(corner) = Corner::shared("sick") else { return };
    service(&corner);
    let sick = corner.name("image:sick");
    Image::shell("echo cannot open the database; exit 3").build(&corner.engine, &sick);
    let before = corner.engine.docker(["inspect", &corner.name("web")]);
    let step = step(&corner, &sick, &json!({ "alias": {} }), &json!({}));
    let test = TestContext::new("web");
    let undo = undo(&step, &test).await;
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent);
    assert!(error.detail().unwrap().contains("cannot open the database"), "{error:?}");
    assert_eq!(corner.answers("api", 3), ["1.0"]);
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(corner.engine.docker(["inspect", &corner.name("web")]), before);
    assert_eq!(corner.colours(), ["web image:1.0 running"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_two_cannot_have_at_once_is_refused_in_the_plan() {
    let Some(corner) = Corner::shared("fixed") else { return };
    let (image, next) = (corner.web("1.0"), corner.web("2.0"));
    let name = corner.name("web");
    let alias = json!({ "alias": {} });
    let step = step(&corner, &next, &alias, &json!({}));
    let error = refused(&step).await;
    assert!(error.message().contains("there is no container"), "{error:?}");

    corner.engine.docker(["run", "--detach", "--name", &name, "--publish", "127.0.0.1:39123:8080", &image]);
    let error = refused(&step).await;
    assert!(error.message().contains("8080/tcp as 39123"), "{error:?}");
    assert!(error.hint().unwrap().contains("let a proxy publish"), "{error:?}");
    corner.engine.docker(["rm", "--force", &name]);

    corner.engine.docker(["run", "--detach", "--name", &name, "--network", "host", &image]);
    assert!(refused(&step).await.message().contains("uses the network of host"));
    corner.engine.docker(["rm", "--force", &name]);

    corner.engine.docker(["run", "--detach", "--name", &name, &image]);
    assert!(refused(&step).await.message().contains("on no network where containers have names"));
    corner.engine.docker(["rm", "--force", &name]);

    corner.network("front");
    let network = corner.name("front");
    let subnet =
        corner.engine.docker(["network", "inspect", "--format", "{{(index .IPAM.Config 0).Subnet}}", &network]);
    let (address, _) = subnet.split_once('/').unwrap();
    let (start, last) = address.rsplit_once('.').unwrap();
    let address = format!("{start}.{}", last.parse::<u32>().unwrap() + 9);
    corner.engine.docker(["run", "--detach", "--name", &name, "--network", &network, "--ip", &address, &image]);
    assert!(refused(&step).await.message().contains(&format!("the fixed address {address}")));
    corner.engine.docker(["rm", "--force", &name]);

    corner.engine.docker(["run", "--detach", "--name", &name, "--network", &network, "--network-alias", "api", &image]);
    let other = corner.name("other");
    corner.engine.docker([
        "run",
        "--detach",
        "--name",
        &other,
        "--network",
        &network,
        "--network-alias",
        "api",
        &image,
    ]);
    let error = refused(&step).await;
    assert!(error.message().contains("the name api") && error.message().contains(&other), "{error:?}");
    corner.engine.docker(["rm", "--force", &other]);
    let blue = corner.name("web-blue");
    corner.engine.docker(["create", "--name", &blue, &image]);
    assert!(refused(&step).await.message().contains("nobody knows which one serves"));
    corner.engine.docker(["rm", &blue]);
    corner.engine.docker(["kill", &name]);
    assert!(refused(&step).await.message().contains("does not run: exited"));
}
