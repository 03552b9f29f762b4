//! Steps and checks for Kubernetes.
