//! The engine ends at each call of a replacement: afterwards one container serves, never none or both.

#![cfg(test)]

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upgrade_core::step::{Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_docker::steps::Container;
use upgrade_testbed::docker::{self, Image, Own};

use super::{container, undo};
use crate::world::Corner;

/// How an engine ends, and how long after it was asked to replace a container.
#[derive(Clone, Copy, Debug)]
enum End {
    /// As by a fault: its containers go on.
    Killed,
    /// As with its machine: its containers end with it.
    Stopped,
}

struct Scene {
    corner: Corner,
    // After the corner, which is cleared while the engine is there.
    own: Own,
    name: String,
    new: String,
}

impl Scene {
    fn new() -> Option<Self> {
        let own = docker::own()?;
        let corner = Corner::of(own.engine(), "web");
        let (name, old, new) = (corner.name("web"), corner.name("image:1"), corner.name("image:2"));
        for (version, tag) in [("1", &old), ("2", &new)] {
            Image::shell("sleep 1000").with(&format!("LABEL version={version}")).build(own.engine(), tag);
        }
        let start = ["run", "--detach", "--network", "none", "--restart", "always", "--name", &name, &old];
        own.engine().docker(start);
        Some(Self { corner, own, name, new })
    }

    fn step(&self) -> Container {
        container(&self.corner, json!({ "name": self.name, "image": self.new }))
    }

    /// Asks that one container serves, and no other; an engine that missed its end may only just start it
    /// again.
    fn serves(&self, container: &str, when: &str) {
        let began = Instant::now();
        while self.serving() != [container] {
            let all = || self.corner.engine.docker(["ps", "--all", "--format", "{{.Names}} {{.Image}} {{.Status}}"]);
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "{when}: {:?}, not {container}: {}",
                self.serving(),
                all()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Every container that runs, and its image.
    fn serving(&self) -> Vec<String> {
        let all = self.corner.engine.docker(["ps", "--format", "{{.Names}} {{.Image}}"]);
        let mut all: Vec<_> = all.lines().map(|line| line.replace(&self.corner.prefix, "PREFIX")).collect();
        all.sort_unstable();
        all
    }

    /// Ends the engine while the call works, starts it again, and says what the call answered.
    async fn end_during<T: Send + 'static>(
        &self,
        end: End,
        after: Duration,
        call: impl Future<Output = T> + Send + 'static,
    ) -> T {
        let call = tokio::spawn(call);
        tokio::time::sleep(after).await;
        match end {
            End::Killed => self.own.kill(),
            End::Stopped => self.own.stop(),
        }
        let answer = call.await.unwrap();
        self.own.start();
        answer
    }

    /// Lives through one end; returns how far the replacement had come.
    async fn live(&self, end: End, after: Duration, resumes: bool) -> String {
        let test = TestContext::new("web");
        let step = std::sync::Arc::new(self.step());
        let found = undo(&step, &test).await;
        let before: Value = serde_json::to_value(&found).unwrap();
        let answer = {
            let (step, cx, found) = (step.clone(), test.forward(), found.clone());
            self.end_during(end, after, async move { step.apply(&cx, &found).await }).await
        };
        let between = self.serving();
        // Whoever comes first after it: the engine must not have started both by itself.
        assert!(between.len() <= 1, "{end:?} after {after:?}: {between:?}");
        if resumes {
            step.settle(&test.forward(), &found).await.unwrap();
            step.apply(&test.forward(), &found).await.unwrap();
            self.serves("PREFIX-web PREFIX-image:2", &format!("{end:?} after {after:?}"));
        }
        step.settle(&test.back(), &found).await.unwrap();
        step.rollback(&test.back(), &found, None).await.unwrap();
        let all = self.is_back(&format!("{end:?} after {after:?}"));
        assert_eq!(all, before["found"]["id"].as_str().unwrap(), "{end:?} after {after:?}");
        format!("{end:?} after {after:?}: {} and {between:?}", if answer.is_ok() { "done" } else { "cut off" })
    }

    /// Asks that the old container serves, as it was, and that there is no other; returns its id.
    fn is_back(&self, when: &str) -> String {
        self.serves("PREFIX-web PREFIX-image:1", when);
        let policy = ["inspect", "--format", "{{.HostConfig.RestartPolicy.Name}}", &self.name];
        assert_eq!(self.corner.engine.docker(policy), "always", "{when}");
        self.corner.engine.docker(["ps", "--all", "--quiet", "--no-trunc"])
    }

    /// Lives through one end on the way back; returns how far that had come.
    async fn live_back(&self, end: End, after: Duration) -> String {
        let when = format!("{end:?} {after:?} into the way back");
        let test = TestContext::new("web");
        let step = std::sync::Arc::new(self.step());
        let found = undo(&step, &test).await;
        let before: Value = serde_json::to_value(&found).unwrap();
        step.apply(&test.forward(), &found).await.unwrap();
        let answer = {
            let (step, cx, found) = (step.clone(), test.back(), found.clone());
            self.end_during(end, after, async move { step.rollback(&cx, &found, None).await }).await
        };
        let between = self.serving();
        assert!(between.len() <= 1, "{when}: {between:?}");
        step.settle(&test.back(), &found).await.unwrap();
        step.rollback(&test.back(), &found, None).await.unwrap_or_else(|error| panic!("{when}: {error:?}"));
        let same = self.is_back(&when) == before["found"]["id"].as_str().unwrap();
        let made = if same { "the same" } else { "made again" };
        format!("{when}: {} and {between:?}, {made}", if answer.is_ok() { "done" } else { "cut off" })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_ends_leaves_one_container_serving() {
    let Some(scene) = Scene::new() else { return };
    for (number, after) in [60, 160, 300, 500].into_iter().enumerate() {
        let end = if number % 2 == 0 { End::Killed } else { End::Stopped };
        println!("{}", scene.live(end, Duration::from_millis(after), number % 2 == 1).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a campaign of some minutes: an end every 20 ms of a replacement"]
async fn campaign_an_engine_that_ends_leaves_one_container_serving() {
    let Some(scene) = Scene::new() else { return };
    for after in (0..800).step_by(20) {
        for end in [End::Killed, End::Stopped] {
            println!("{}", scene.live(end, Duration::from_millis(after), after % 40 == 0).await);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_ends_on_the_way_back_leaves_the_old_container_serving() {
    let Some(scene) = Scene::new() else { return };
    for (number, after) in [40, 150, 260, 380].into_iter().enumerate() {
        let end = if number % 2 == 0 { End::Killed } else { End::Stopped };
        println!("{}", scene.live_back(end, Duration::from_millis(after)).await);
    }
}

/// `cargo nextest run -p upgrade-docker --run-ignored only campaign_an_engine`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a campaign of some minutes: an end every 10 ms of a way back"]
async fn campaign_an_engine_that_ends_on_the_way_back_leaves_the_old_container_serving() {
    let Some(scene) = Scene::new() else { return };
    for after in (0..600).step_by(10) {
        for end in [End::Killed, End::Stopped] {
            println!("{}", scene.live_back(end, Duration::from_millis(after)).await);
        }
    }
}
