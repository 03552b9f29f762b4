//! What `prepare` finds, and what it refuses.

use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::step::{Change, Effect, Prepared};

use super::{Canary, CanaryOutput, CanaryUndo, RouteUndo, route};
use crate::naming::beside;
use crate::object::{Object, ObjectName};
use crate::server::ApiServer;
use crate::steps::pair::Planned;
use crate::steps::rollout::images_of;

impl Canary {
    pub(super) async fn plan(&self, cx: &Context) -> Result<Prepared<CanaryUndo, CanaryOutput>, StepError> {
        let server = self.pair.cluster.connect(cx).await?;
        let (pair, lines) = match self.pair.plan(&server, cx).await? {
            Planned::Beside(pair, lines) => (*pair, lines),
            Planned::Already(there) => {
                let output = CanaryOutput { deployment: self.config.deployment.clone(), images: images_of(&there) };
                return Ok(Prepared::unchanged(output, "it runs with these settings already"));
            }
        };
        let pods = pods_of(&server.require(&self.pair.deployment(&self.config.deployment)).await?);
        if pods == 0 {
            return Err(StepError::permanent(format!("deployment/{} has no pods", self.config.deployment))
                .with_hint("there is no traffic to share: scale it up, or use k8s.rollout"));
        }
        let route = match &self.config.route {
            Some(name) => Some(self.route(&server, name, cx).await?),
            None => None,
        };
        let weights: Vec<_> = self.config.weights.iter().map(|each| self.said(pods, each.weight())).collect();
        let led = match &route {
            Some(route) => route.object.to_string(),
            None => self.pair.service(&self.config.service).to_string(),
        };
        let mut changes = vec![
            Change::new(Effect::Create, format!("deployment {}/{}", pair.namespace, pair.green)).with_summary(lines),
        ];
        if let Some(route) = &route {
            changes.push(Change::new(Effect::Create, format!("service {}/{}", pair.namespace, route.service)));
        }
        changes.push(Change::new(Effect::Modify, led).with_summary(format!(
            "traffic to it: {}; {} is kept whole until commit",
            weights.join(", "),
            self.config.deployment
        )));
        Ok(Prepared::change(CanaryUndo { pair, route }, changes))
    }

    /// Says what a weight comes to: of a few pods, not every share can be had.
    pub(super) fn said(&self, pods: u64, weight: u8) -> String {
        let new = self.pods_for(pods, weight);
        if self.config.route.is_some() || weight == 100 {
            return format!("{weight}% ({new} pods)");
        }
        let real = new * 100 / (new + pods);
        if real == u64::from(weight) {
            format!("{weight}% ({new} of {} pods)", new + pods)
        } else {
            format!("{weight}% (in fact {real}%: {new} of {} pods)", new + pods)
        }
    }

    /// Returns how many pods the second Deployment needs at a weight.
    pub(super) fn pods_for(&self, stable: u64, weight: u8) -> u64 {
        let weight = u64::from(weight);
        match self.config.route {
            // All that the Service leads to share alike, and those that were there stay.
            None if weight < 100 => (stable * weight).div_ceil(100 - weight),
            // Each must bear as much as one of those that were there.
            _ => (stable * weight).div_ceil(100),
        }
    }

    async fn route(&self, server: &ApiServer, name: &str, cx: &Context) -> Result<RouteUndo, StepError> {
        let Some(kind) = server.find_kind(None, route::HTTP_ROUTES).await? else {
            return Err(StepError::permanent("this cluster knows no HTTPRoute")
                .with_hint("install the Gateway API, or leave `route` out: weights by the number of pods"));
        };
        let object = ObjectName::new(kind, &self.pair.namespace, name);
        let found = server.require(&object).await?;
        let backends = route::backends(&found);
        let service = &self.config.service;
        if !route::leads_to(&backends, service, &self.pair.namespace) {
            return Err(StepError::permanent(format!(
                "{object} does not lead to service {service}, but to: {}",
                route::names(&backends).join(", ")
            ))
            .with_hint("name the Service that stands in its `backendRefs`"));
        }
        if !route::is_divisible(&backends) {
            return Err(StepError::permanent(format!("the weights of {object} are too large to be shared"))
                .with_hint("the API allows a million; write them in lowest terms"));
        }
        Ok(RouteUndo { object, uid: found.uid().to_owned(), service: beside(service, "canary", cx), backends })
    }
}

/// Returns how many pods a Deployment is to have.
pub(super) fn pods_of(deployment: &Object) -> u64 {
    deployment.at("/spec/replicas").as_u64().unwrap_or(1)
}
