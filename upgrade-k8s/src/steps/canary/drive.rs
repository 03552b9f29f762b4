//! The way there, weight by weight, the way back, and the end.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::StepError;
use upgrade_core::units::Span;

use super::plan::pods_of;
use super::{Canary, CanaryOutput, CanaryUndo, PausedWeightConfig, RouteUndo, SIDES, WeightConfig, route};
use crate::object::patch;
use crate::server::Deletion;
use crate::steps::analysis::SideNames;
use crate::steps::pair::{LedService, Selector, Sides, conflict};
use crate::steps::rollout::images_of;

/// How often the new pods are looked at while a weight stays.
const LOOK: Duration = Duration::from_secs(1);

/// Remembers which weights have been passed.
#[derive(Serialize, Deserialize)]
struct Passed {
    weights: usize,
}

impl Canary {
    pub(super) async fn forward(&self, cx: &Context, undo: &CanaryUndo) -> Result<CanaryOutput, StepError> {
        let sides = self.pair.sides(cx, &undo.pair).await?;
        if undo.route.is_some() {
            // Its share is the route's to give: the Service that is there must not lead to it as well.
            sides.hold().await?;
        }
        let passed = cx.last_checkpoint::<Passed>()?.map_or(0, |passed| passed.weights);
        let stable = pods_of(&sides.blue().await?);
        let first = self.config.weights.get(passed).map_or(100, |weight| weight.weight());
        let made = sides.make(Some(self.pods_for(stable, first))).await?;
        for (at, weight) in self.config.weights.iter().enumerate().skip(passed) {
            let hash = self.give(&sides, undo, weight.weight()).await?;
            self.observe(&sides, &hash, *weight).await?;
            cx.checkpoint(&Passed { weights: at + 1 }).await?;
        }
        Ok(CanaryOutput { deployment: undo.pair.green.clone(), images: images_of(&made) })
    }

    pub(super) async fn back(&self, cx: &Context, undo: &CanaryUndo) -> Result<(), StepError> {
        let sides = self.pair.sides(cx, &undo.pair).await?;
        if let Some(route) = &undo.route {
            self.lead(&sides, route, None).await?;
        }
        sides.release().await?;
        self.end(&sides, undo).await
    }

    pub(super) async fn finish(&self, cx: &Context, undo: &CanaryUndo) -> Result<(), StepError> {
        let sides = self.pair.sides(cx, &undo.pair).await?;
        let hash = sides.renew().await?;
        sides.settle(&hash).await?;
        if let Some(route) = &undo.route {
            self.lead(&sides, route, None).await?;
        }
        self.end(&sides, undo).await
    }

    /// Gives the new pods a share of the traffic; returns what they are known by.
    async fn give(&self, sides: &Sides<'_>, undo: &CanaryUndo, weight: u8) -> Result<String, StepError> {
        let pods = pods_of(&sides.blue().await?);
        sides.cx.progress(0, 0, format!("{}: {}", self.config.deployment, self.said(pods, weight)));
        sides.scale(self.pods_for(pods, weight)).await?;
        let hash = sides.green_complete().await?;
        match &undo.route {
            Some(route) => {
                let service = self.serve(sides, route, &hash).await?;
                sides.followed(&service, &undo.pair.green).await?;
                self.lead(sides, route, Some(weight)).await?;
            }
            None if weight == 100 => sides.switch(&undo.pair.services[0], &undo.pair.green, &hash).await?,
            None => {}
        }
        Ok(hash)
    }

    /// Watches the new pods and what is measured of them, for as long as the weight stays.
    async fn observe(&self, sides: &Sides<'_>, hash: &str, weight: WeightConfig) -> Result<(), StepError> {
        let (weight, pause) = match weight {
            WeightConfig::Weight(weight) => (weight, self.config.pause),
            WeightConfig::Paused(PausedWeightConfig { weight, pause }) => (weight, pause),
        };
        let Span(pause) = pause;
        let names = SideNames { new: (SIDES[0], hash), old: (SIDES[1], &sides.undo.blue) };
        let what = format!("{} at {weight}%", self.config.deployment);
        let watch = async {
            loop {
                sides.server.pause(LOOK).await?;
                if !sides.is_green_complete().await? {
                    sides.green_complete().await?;
                }
            }
        };
        tokio::select! {
            passes = self.analysis.passes(sides.cx, &names, pause, &what) => passes,
            failed = watch => failed,
        }
    }

    /// Makes the Service before the second Deployment, or finds the one that an earlier call made.
    async fn serve(&self, sides: &Sides<'_>, route: &RouteUndo, hash: &str) -> Result<LedService, StepError> {
        let found = &sides.undo.services[0];
        let name = self.pair.service(&route.service);
        let selector = Selector(found.selector.clone()).pinned(hash);
        let stable = sides.server.require(&self.pair.service(&found.name)).await?;
        let mut ports = stable.at("/spec/ports").clone();
        for port in ports.as_array_mut().into_iter().flatten().filter_map(Value::as_object_mut) {
            port.remove("nodePort");
        }
        let body = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": route.service },
            "spec": { "ports": ports, "selector": selector.value() },
        });
        let there = sides.server.create_own(&name, &body).await?;
        Ok(LedService { name: route.service.clone(), uid: there.uid().to_owned(), selector: selector.0 })
    }

    /// Shares the traffic of the route: so many of a hundred to the new pods, or as it was found.
    async fn lead(&self, sides: &Sides<'_>, undo: &RouteUndo, weight: Option<u8>) -> Result<(), StepError> {
        let shared = |weight| {
            let namespace = &sides.undo.namespace;
            route::shared(&undo.backends, &self.config.service, &undo.service, namespace, weight)
        };
        let intended = weight.map_or_else(|| undo.backends.clone(), shared);
        let changed = sides.server.change(&undo.object, |present| {
            let now = route::backends(present);
            if now == intended {
                return Ok(None);
            }
            let is_known =
                present.uid() == undo.uid && (now == undo.backends || (0..=100).any(|weight| now == shared(weight)));
            if !is_known && sides.cx.on_conflict() == OnConflict::Stop {
                let text = |backends: &[Value]| Value::from(backends.to_vec()).to_string();
                return Err(conflict(&undo.object.to_string(), &text(&undo.backends), &text(&intended), &text(&now)));
            }
            let rules = intended.iter().enumerate().filter(|(_, backends)| !backends.is_null());
            let parts = rules.map(|(at, backends)| (format!("/spec/rules/{at}/backendRefs"), Some(backends.clone())));
            Ok(Some(patch(present, parts)))
        });
        changed.await?;
        let share = weight.map_or_else(|| "as it was found".into(), |weight| format!("{weight}% to the canary"));
        sides.cx.progress(0, 0, format!("{}: {share}", undo.object));
        Ok(())
    }

    /// Removes what was made, when no traffic goes there.
    async fn end(&self, sides: &Sides<'_>, undo: &CanaryUndo) -> Result<(), StepError> {
        if let Some(route) = &undo.route {
            let name = self.pair.service(&route.service);
            if let Some(there) = sides.server.get_own(&name).await? {
                let how = Deletion { uid: Some(there.uid().to_owned()), ..Deletion::default() };
                sides.server.delete(&name, &how).await?;
                sides.server.await_gone(&name, there.uid()).await?;
            }
        }
        sides.end().await
    }
}
