//! Handing a run over to a helper, as far as it concerns the engine.

#![cfg(test)]

use upgrade_core::testkit::TestContext;
use upgrade_docker::handover::{self, Handover};
use upgrade_docker::{containers, naming};
use upgrade_testbed::docker::Image;

use crate::world::{Corner, target};

#[tokio::test]
async fn a_helper_has_what_the_container_has_and_is_made_once() {
    let Some(corner) = Corner::shared("handover") else { return };
    let engine = &corner.engine;
    let (image, name, volume) = (corner.name("image:1"), corner.name("web"), corner.name("state"));
    Image::shell("sleep 1000").build(engine, &image);
    let (first, second) = (corner.name("first"), corner.name("second"));
    for network in [&first, &second] {
        engine.docker(["network", "create", network]);
    }
    engine.docker([
        "create",
        "--name",
        &name,
        "--network",
        &first,
        "--volume",
        &format!("{volume}:/state"),
        "--env",
        "A=1",
        &image,
    ]);
    engine.docker(["network", "connect", &second, &name]);
    engine.docker(["start", &name]);
    let cx = TestContext::new("web").forward();
    let client = target(engine.host()).connect(&cx).await.unwrap();
    let container = containers::inspect(&client, &name).await.unwrap().unwrap();

    let handover = |state: &str, script: &str| Handover {
        state: state.into(),
        command: ["sh", "-c", script, "sh", "RUN"].map(str::to_owned).into(),
    };
    let error = handover("/elsewhere", "true").check(&container).unwrap_err();
    assert!(
        error.message().contains("it would end with it") && error.hint().unwrap().contains("--volume"),
        "{error:?}"
    );
    let handover = handover("/state/journal", "echo $1 $A >>/state/taken; test -f /state/enough");
    handover.check(&container).unwrap();
    for _ in 0..2 {
        handover.prepare(&client, &cx, &container).await.unwrap();
    }
    let helper = format!("{name}.helper-{}", naming::mark(&cx));
    let networks = engine.docker([
        "inspect",
        "--format",
        "{{range $name, $_ := .NetworkSettings.Networks}}{{$name}} {{end}}",
        &helper,
    ]);
    assert!(networks.contains(&first) && networks.contains(&second), "{networks}");
    // It failed so far, and the engine starts it again.
    std::thread::sleep(std::time::Duration::from_secs(1));
    engine.docker(["exec", &name, "touch", "/state/enough"]);
    let code = engine.docker(["wait", &helper]);
    assert_eq!(code, "0");
    let taken = engine.docker(["exec", &name, "cat", "/state/taken"]);
    assert!(taken.lines().count() > 1 && taken.lines().all(|line| line == format!("{} 1", cx.run())), "{taken}");
    handover::clear(&client, &name).await.unwrap();
    handover::clear(&client, &name).await.unwrap();
    assert!(containers::inspect(&client, &helper).await.unwrap().is_none());
}
