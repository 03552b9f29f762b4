//! Which APIs Kubernetes has removed, in which version, and what is there instead.
//!
//! The source is the project's own guide
//! (<https://kubernetes.io/docs/reference/using-api/deprecation-guide/>), all of its versions from 1.16 to 1.32; for
//! `PodSecurityPolicy` in `extensions/v1beta1`, which it leaves out, the announcement of 1.16
//! (<https://kubernetes.io/blog/2019/07/18/api-deprecations-in-1-16/>).

/// Names an API that is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removed {
    /// The minor version of Kubernetes 1 that no longer serves it.
    pub minor: u64,
    /// As `apiVersion` spells it.
    pub api_version: &'static str,
    /// The kind.
    pub kind: &'static str,
    /// Its name in addresses.
    pub plural: &'static str,
    /// The `apiVersion` to write instead, and the minor version that first served it; none where the kind is gone.
    pub instead: Option<(&'static str, u64)>,
}

const fn of(
    minor: u64,
    api_version: &'static str,
    kind: &'static str,
    plural: &'static str,
    instead: &'static str,
    since: u64,
) -> Removed {
    Removed { minor, api_version, kind, plural, instead: Some((instead, since)) }
}

const fn gone(minor: u64, api_version: &'static str, kind: &'static str, plural: &'static str) -> Removed {
    Removed { minor, api_version, kind, plural, instead: None }
}

const FLOW: &str = "flowcontrol.apiserver.k8s.io/v1";

/// Lists what was removed, the latest first.
#[rustfmt::skip]
pub const REMOVED: &[Removed] = &[
    of(32, "flowcontrol.apiserver.k8s.io/v1beta3", "FlowSchema", "flowschemas", FLOW, 29),
    of(32, "flowcontrol.apiserver.k8s.io/v1beta3", "PriorityLevelConfiguration", "prioritylevelconfigurations", FLOW, 29),
    of(29, "flowcontrol.apiserver.k8s.io/v1beta2", "FlowSchema", "flowschemas", FLOW, 29),
    of(29, "flowcontrol.apiserver.k8s.io/v1beta2", "PriorityLevelConfiguration", "prioritylevelconfigurations", FLOW, 29),
    of(27, "storage.k8s.io/v1beta1", "CSIStorageCapacity", "csistoragecapacities", "storage.k8s.io/v1", 24),
    of(26, "flowcontrol.apiserver.k8s.io/v1beta1", "FlowSchema", "flowschemas", "flowcontrol.apiserver.k8s.io/v1beta2", 23),
    of(26, "flowcontrol.apiserver.k8s.io/v1beta1", "PriorityLevelConfiguration", "prioritylevelconfigurations", "flowcontrol.apiserver.k8s.io/v1beta2", 23),
    of(26, "autoscaling/v2beta2", "HorizontalPodAutoscaler", "horizontalpodautoscalers", "autoscaling/v2", 23),
    of(25, "batch/v1beta1", "CronJob", "cronjobs", "batch/v1", 21),
    of(25, "discovery.k8s.io/v1beta1", "EndpointSlice", "endpointslices", "discovery.k8s.io/v1", 21),
    of(25, "events.k8s.io/v1beta1", "Event", "events", "events.k8s.io/v1", 19),
    of(25, "autoscaling/v2beta1", "HorizontalPodAutoscaler", "horizontalpodautoscalers", "autoscaling/v2", 23),
    of(25, "policy/v1beta1", "PodDisruptionBudget", "poddisruptionbudgets", "policy/v1", 21),
    gone(25, "policy/v1beta1", "PodSecurityPolicy", "podsecuritypolicies"),
    of(25, "node.k8s.io/v1beta1", "RuntimeClass", "runtimeclasses", "node.k8s.io/v1", 20),
    of(22, "admissionregistration.k8s.io/v1beta1", "MutatingWebhookConfiguration", "mutatingwebhookconfigurations", "admissionregistration.k8s.io/v1", 16),
    of(22, "admissionregistration.k8s.io/v1beta1", "ValidatingWebhookConfiguration", "validatingwebhookconfigurations", "admissionregistration.k8s.io/v1", 16),
    of(22, "apiextensions.k8s.io/v1beta1", "CustomResourceDefinition", "customresourcedefinitions", "apiextensions.k8s.io/v1", 16),
    of(22, "apiregistration.k8s.io/v1beta1", "APIService", "apiservices", "apiregistration.k8s.io/v1", 10),
    of(22, "authentication.k8s.io/v1beta1", "TokenReview", "tokenreviews", "authentication.k8s.io/v1", 6),
    of(22, "authorization.k8s.io/v1beta1", "LocalSubjectAccessReview", "localsubjectaccessreviews", "authorization.k8s.io/v1", 6),
    of(22, "authorization.k8s.io/v1beta1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", "authorization.k8s.io/v1", 6),
    of(22, "authorization.k8s.io/v1beta1", "SubjectAccessReview", "subjectaccessreviews", "authorization.k8s.io/v1", 6),
    of(22, "certificates.k8s.io/v1beta1", "CertificateSigningRequest", "certificatesigningrequests", "certificates.k8s.io/v1", 19),
    of(22, "coordination.k8s.io/v1beta1", "Lease", "leases", "coordination.k8s.io/v1", 14),
    of(22, "extensions/v1beta1", "Ingress", "ingresses", "networking.k8s.io/v1", 19),
    of(22, "networking.k8s.io/v1beta1", "Ingress", "ingresses", "networking.k8s.io/v1", 19),
    of(22, "networking.k8s.io/v1beta1", "IngressClass", "ingressclasses", "networking.k8s.io/v1", 19),
    of(22, "rbac.authorization.k8s.io/v1beta1", "ClusterRole", "clusterroles", "rbac.authorization.k8s.io/v1", 8),
    of(22, "rbac.authorization.k8s.io/v1beta1", "ClusterRoleBinding", "clusterrolebindings", "rbac.authorization.k8s.io/v1", 8),
    of(22, "rbac.authorization.k8s.io/v1beta1", "Role", "roles", "rbac.authorization.k8s.io/v1", 8),
    of(22, "rbac.authorization.k8s.io/v1beta1", "RoleBinding", "rolebindings", "rbac.authorization.k8s.io/v1", 8),
    of(22, "scheduling.k8s.io/v1beta1", "PriorityClass", "priorityclasses", "scheduling.k8s.io/v1", 14),
    of(22, "storage.k8s.io/v1beta1", "CSIDriver", "csidrivers", "storage.k8s.io/v1", 19),
    of(22, "storage.k8s.io/v1beta1", "CSINode", "csinodes", "storage.k8s.io/v1", 17),
    of(22, "storage.k8s.io/v1beta1", "StorageClass", "storageclasses", "storage.k8s.io/v1", 6),
    of(22, "storage.k8s.io/v1beta1", "VolumeAttachment", "volumeattachments", "storage.k8s.io/v1", 13),
    of(16, "extensions/v1beta1", "NetworkPolicy", "networkpolicies", "networking.k8s.io/v1", 8),
    of(16, "extensions/v1beta1", "PodSecurityPolicy", "podsecuritypolicies", "policy/v1beta1", 10),
    of(16, "extensions/v1beta1", "DaemonSet", "daemonsets", "apps/v1", 9),
    of(16, "apps/v1beta2", "DaemonSet", "daemonsets", "apps/v1", 9),
    of(16, "extensions/v1beta1", "Deployment", "deployments", "apps/v1", 9),
    of(16, "apps/v1beta1", "Deployment", "deployments", "apps/v1", 9),
    of(16, "apps/v1beta2", "Deployment", "deployments", "apps/v1", 9),
    of(16, "apps/v1beta1", "StatefulSet", "statefulsets", "apps/v1", 9),
    of(16, "apps/v1beta2", "StatefulSet", "statefulsets", "apps/v1", 9),
    of(16, "extensions/v1beta1", "ReplicaSet", "replicasets", "apps/v1", 9),
    of(16, "apps/v1beta1", "ReplicaSet", "replicasets", "apps/v1", 9),
    of(16, "apps/v1beta2", "ReplicaSet", "replicasets", "apps/v1", 9),
];

impl Removed {
    /// Finds what a manifest would ask for.
    pub fn find(api_version: &str, kind: &str) -> Option<&'static Self> {
        REMOVED.iter().find(|each| each.api_version == api_version && each.kind == kind)
    }

    /// Says when it goes, and what to write instead.
    pub fn line(&self) -> String {
        let gone = format!("{} {} is gone in 1.{}", self.api_version, self.kind, self.minor);
        match self.instead {
            Some((instead, since)) => format!("{gone}: write {instead}, there since 1.{since}"),
            None => format!("{gone}, with nothing in its place: use Pod Security admission or a policy of your own"),
        }
    }

    /// Tells whether objects of it are kept, and written by people rather than by the cluster for some minutes.
    pub(crate) fn is_kept(&self) -> bool {
        !matches!(self.kind, "Event") && !self.kind.ends_with("Review")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_whole_and_says_each_thing_once() {
        for (at, each) in REMOVED.iter().enumerate() {
            let group = each.api_version.split_once('/').unwrap();
            assert!(!group.0.is_empty() && group.1.contains("beta"), "{each:?}");
            assert!(each.instead.is_none_or(|(_, since)| since <= each.minor), "{each:?}");
            assert!(each.plural.starts_with(&each.kind.to_lowercase()[..3]), "{each:?}");
            assert!(
                REMOVED[at + 1..].iter().all(|other| (other.api_version, other.kind) != (each.api_version, each.kind))
            );
        }
        let minors: std::collections::BTreeSet<_> = REMOVED.iter().map(|each| each.minor).collect();
        assert_eq!(minors.into_iter().collect::<Vec<_>>(), [16, 22, 25, 26, 27, 29, 32]);
        assert!(Removed::find("batch/v1beta1", "CronJob").unwrap().line().contains("batch/v1, there since 1.21"));
        assert!(Removed::find("policy/v1beta1", "PodSecurityPolicy").unwrap().line().contains("nothing in its place"));
        assert_eq!(Removed::find("batch/v1", "CronJob"), None);
    }
}
