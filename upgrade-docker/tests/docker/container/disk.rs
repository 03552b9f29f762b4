//! An engine whose disk is full: the old container serves on, and the message says what to do.

#![cfg(test)]

use std::path::Path;

use serde_json::json;
use upgrade_core::error::{Class, StepError};
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_docker::steps::Image as ImageStep;
use upgrade_testbed::docker::{self, Image};

use super::{container, undo};
use crate::world::{Corner, build_context};

/// What the engine's disk has left, in bytes.
fn left(root: &Path) -> u64 {
    let asked = std::process::Command::new("df").args(["--block-size=1", "--output=avail"]).arg(root).output().unwrap();
    String::from_utf8_lossy(&asked.stdout).lines().last().unwrap().trim().parse().unwrap()
}

fn says_so(error: &StepError) {
    assert_eq!(error.class(), Class::Permanent, "{error:?}");
    assert!(error.message().contains("no space left on device"), "{error:?}");
    assert!(error.hint().unwrap().contains("free space for the engine"), "{error:?}");
}

#[tokio::test]
async fn a_full_disk_stops_nothing_and_keeps_nothing() {
    let (Some(elsewhere), Some(own), Some(registry)) =
        (Corner::shared("large"), docker::own_with_disk(48), docker::registry(false))
    else {
        return;
    };
    let corner = Corner::of(own.engine(), "full");
    let large = format!("{}/{}:2", registry.address(), elsewhere.prefix);
    Image::shell("sleep 1000")
        .with("RUN dd if=/dev/urandom of=/data/large bs=1M count=40")
        .build(&elsewhere.engine, &large);
    elsewhere.engine.docker(["push", "--quiet", &large]);
    elsewhere.engine.docker(["image", "rm", &large]);
    let (name, old) = (corner.name("web"), corner.name("image:1"));
    Image::shell("sleep 1000").build(&corner.engine, &old);
    corner.engine.docker(["run", "--detach", "--network", "none", "--restart", "always", "--name", &name, &old]);
    let seen = || {
        let containers =
            corner.engine.docker(["ps", "--all", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.Status}}"]);
        let images = corner.engine.docker(["image", "ls", "--all", "--format", "{{.ID}} {{.Repository}}:{{.Tag}}"]);
        // Images made within one second are listed in no order.
        let mut images: Vec<_> = images.lines().collect();
        images.sort_unstable();
        let images = images.join("\n");
        let started = corner.engine.docker(["inspect", "--format", "{{.State.StartedAt}} {{.State.Running}}", &name]);
        format!("{}\n{images}\n{started}", containers.split(" Up ").next().unwrap())
    };
    let before = (seen(), left(&own.root()));

    // While it is pulled: by the container's step, and by one of its own.
    let replaced = container(&corner, json!({ "name": name, "image": large, "pull": "always" }));
    says_so(&replaced.prepare(&TestContext::new("web").forward()).await.unwrap_err());
    let config = serde_json::from_value(json!({ "target": "engine", "image": large })).unwrap();
    let pulled = ImageStep::from_config(config, &build_context(corner.engine.host())).unwrap();
    let test = TestContext::new("pull");
    let Prepared::Change { undo: found, .. } = pulled.prepare(&test.forward()).await.unwrap() else { panic!() };
    says_so(&pulled.apply(&test.forward(), &found).await.unwrap_err());
    pulled.rollback(&test.back(), &found, None).await.unwrap();
    assert_eq!(seen(), before.0);
    let lost = before.1.saturating_sub(left(&own.root()));
    assert!(lost < 1 << 20, "{lost} bytes are gone");

    // While the next container is made: whatever it still could do is undone, at the latest with some room again.
    let next = corner.name("image:2");
    Image::shell("sleep 2000").build(&corner.engine, &next);
    let before = seen();
    let (replaced, test) = (container(&corner, json!({ "name": name, "image": next })), TestContext::new("web"));
    let found = undo(&replaced, &test).await;
    let filler = own.root().join("filler");
    let _ = std::io::copy(&mut std::io::repeat(b'x'), &mut std::fs::File::create(&filler).unwrap());
    assert_eq!(left(&own.root()), 0);
    says_so(&replaced.apply(&test.forward(), &found).await.unwrap_err());
    replaced.settle(&test.back(), &found).await.map_or_else(|error| says_so(&error), |()| ());
    match replaced.rollback(&test.back(), &found, None).await {
        Ok(()) => println!("put back on a full disk"),
        Err(error) => says_so(&error),
    }
    assert_eq!(corner.engine.docker(["inspect", "--format", "{{.State.Running}}", &name]), "true");
    std::fs::remove_file(filler).unwrap();
    super::back(&replaced, &test, &found).await.unwrap();
    assert_eq!(seen(), before);
}
