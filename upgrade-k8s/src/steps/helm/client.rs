//! The `helm` program: its arguments, what it is given, and its answers.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use semver::Version;
use serde_json::{Map, Value};
use upgrade_core::context::Context;
use upgrade_core::durable;
use upgrade_core::error::StepError;
use upgrade_core::sealed::sha256_hex;

use super::config::HelmConfig;
use super::standing::{ReleaseState, Revision, read_history};
use crate::naming;
use crate::object::digest;
use crate::program;
use crate::target::Cluster;

/// The oldest Helm whose `uninstall` can wait.
const OLDEST: Version = Version::new(3, 7, 0);
/// The first Helm in which a dry run says whether it asks the cluster.
const DRY_RUN_SERVER: Version = Version::new(3, 13, 0);

/// What would lead a `helm` elsewhere than its arguments say.
const ELSEWHERE: [&str; 10] = [
    "HELM_DEBUG",
    "HELM_KUBEAPISERVER",
    "HELM_KUBEASGROUPS",
    "HELM_KUBEASUSER",
    "HELM_KUBECAFILE",
    "HELM_KUBECONTEXT",
    "HELM_KUBEINSECURE_SKIP_TLS_VERIFY",
    "HELM_KUBETLS_SERVER_NAME",
    "HELM_KUBETOKEN",
    "HELM_NAMESPACE",
];

/// A directory for what `helm` reads and nobody else may: credentials and values.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    fn prefix(cx: &Context) -> String {
        format!("upgrade-helm-{}-", naming::mark(cx))
    }

    fn make(cx: &Context) -> Result<Self, StepError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("{}{}-{}", Self::prefix(cx), std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| durable::failed(format!("{} cannot be made", path.display()), &error))?;
        Ok(Self(path))
    }

    fn write(&self, name: &str, value: &Value) -> Result<String, StepError> {
        let path = self.0.join(name);
        let written = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .and_then(|mut file| file.write_all(value.to_string().as_bytes()));
        written.map_err(|error| durable::failed(format!("{} cannot be written", path.display()), &error))?;
        Ok(path.display().to_string())
    }

    /// Removes what calls of this step left that did not return.
    pub(super) fn clear(cx: &Context) -> Result<(), StepError> {
        let (directory, prefix) = (std::env::temp_dir(), Self::prefix(cx));
        let Ok(entries) = fs::read_dir(&directory) else { return Ok(()) };
        for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)) {
            let path = entry.path();
            match fs::remove_dir_all(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(durable::failed(format!("{} cannot be removed", path.display()), &error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What an upgrade would make of a release.
pub(super) struct Rendered {
    pub(super) state: ReleaseState,
    pub(super) manifest: String,
}

/// The program, for one release, while one call of a step lasts.
pub(super) struct Helm<'a> {
    cx: &'a Context,
    config: &'a HelmConfig,
    directory: &'a Path,
    namespace: &'a str,
    scratch: Scratch,
    kubeconfig: String,
}

impl<'a> Helm<'a> {
    pub(super) fn new(
        cx: &'a Context,
        cluster: &Cluster,
        config: &'a HelmConfig,
        directory: &'a Path,
        namespace: &'a str,
    ) -> Result<Self, StepError> {
        let scratch = Scratch::make(cx)?;
        let kubeconfig = scratch.write("kubeconfig", &cluster.kubeconfig())?;
        Ok(Self { cx, config, directory, namespace, scratch, kubeconfig })
    }

    fn subject(&self) -> String {
        format!("release {}/{}", self.namespace, self.config.release)
    }

    fn argv(&self, words: &[&str]) -> Vec<String> {
        let cluster = ["--namespace", self.namespace, "--kubeconfig", &self.kubeconfig];
        let all = std::iter::once(self.config.program.as_str()).chain(words.iter().copied()).chain(cluster);
        all.map(str::to_owned).collect()
    }

    fn env() -> Vec<(String, String)> {
        ELSEWHERE.iter().map(|name| ((*name).to_owned(), String::new())).collect()
    }

    async fn run(&self, words: &[&str]) -> Result<String, StepError> {
        let (argv, env) = (self.argv(words), Self::env());
        program::run(self.cx, &self.subject(), &argv, &env, self.directory).await.map_err(|error| self.advised(error))
    }

    async fn read(&self, words: &[&str]) -> Result<Vec<u8>, StepError> {
        let (argv, env) = (self.argv(words), Self::env());
        program::read(self.cx, &self.subject(), &argv, &env, self.directory).await.map_err(|error| self.advised(error))
    }

    fn advised(&self, error: StepError) -> StepError {
        let release = &self.config.release;
        let said = error.detail().unwrap_or_default().to_owned();
        if error.message().ends_with("cannot be started") {
            return StepError::permanent(format!("there is no helm: `{}` cannot be started", self.config.program))
                .with_hint("install Helm 3.7 or later, or name it: `program: /usr/local/bin/helm`");
        }
        let (class, hint) = if said.contains("cluster unreachable") {
            ("transient", "check that the API server runs and is reached from here: `kubectl get --raw /readyz`".into())
        } else if said.contains("timed out waiting") || said.contains("deadline exceeded") {
            (
                "permanent",
                format!(
                    "what is not ready: `kubectl get pods --selector app.kubernetes.io/instance={release}`, `kubectl get events`; or raise `deadline`"
                ),
            )
        } else if said.contains("another operation") {
            ("permanent", format!("somebody else works on it: `helm history {release}`"))
        } else {
            return error;
        };
        let advised = match class {
            "transient" => StepError::transient(error.message().to_owned()),
            _ => StepError::permanent(error.message().to_owned()),
        };
        advised.with_detail(said).with_hint(hint)
    }

    /// Makes sure that this Helm can do what is needed.
    pub(super) async fn version(&self) -> Result<Version, StepError> {
        let said = self.run(&["version", "--template", "{{.Version}}"]).await?;
        match Version::parse(said.trim().trim_start_matches('v')) {
            Ok(version) if version >= OLDEST => Ok(version),
            _ => Err(StepError::permanent(format!("{} is Helm {}", self.config.program, said.trim()))
                .with_hint(format!("install Helm {OLDEST} or later, or name one as `program`"))),
        }
    }

    /// Returns the revisions of the release, the last one last; none if there is no such release.
    pub(super) async fn history(&self) -> Result<Vec<Revision>, StepError> {
        match self.read(&["history", &self.config.release, "--output", "json"]).await {
            Err(error) if error.detail().is_some_and(|said| said.contains("release: not found")) => Ok(Vec::new()),
            answer => read_history(&answer?),
        }
    }

    /// Returns the manifest of a revision.
    pub(super) async fn manifest(&self, revision: u64) -> Result<String, StepError> {
        let answer = self.read(&["get", "manifest", &self.config.release, "--revision", &revision.to_string()]).await?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }

    /// Returns what a revision consists of, and its manifest.
    pub(super) async fn state(&self, revision: &Revision) -> Result<Rendered, StepError> {
        let number = revision.revision.to_string();
        let values =
            self.read(&["get", "values", &self.config.release, "--revision", &number, "--output", "json"]).await?;
        let manifest = self.manifest(revision.revision).await?;
        let values = self.json(&values, "get values")?;
        Ok(Rendered { state: state(revision.chart.clone(), &values, &manifest), manifest })
    }

    fn json(&self, answer: &[u8], of: &str) -> Result<Value, StepError> {
        serde_json::from_slice(answer).map_err(|error| {
            StepError::permanent(format!("{}: the answer of `helm {of}` cannot be read", self.subject()))
                .with_cause(&error)
                .with_hint("run it by hand with `--output json`; take Helm 3.7 or later")
        })
    }

    /// The arguments that say what the release is to be.
    async fn wanted(&self) -> Result<Vec<String>, StepError> {
        let config = self.config;
        let mut words = vec!["upgrade".to_owned(), config.release.clone(), config.chart.clone()];
        let own: Map<String, Value> = config.own_values(self.cx).await?;
        let own = self.scratch.write("values.json", &own.into())?;
        let files = config.values.iter().map(|path| path.display().to_string()).chain([own]);
        words.extend(files.flat_map(|file| ["--values".to_owned(), file]));
        words.push(if config.reuse_values { "--reuse-values" } else { "--reset-values" }.to_owned());
        words.extend(config.chart_version.iter().flat_map(|version| ["--version".to_owned(), version.clone()]));
        if config.install {
            words.push("--install".to_owned());
        }
        words.extend(["--history-max".to_owned(), config.history_max.to_string()]);
        Ok(words)
    }

    fn waiting(&self) -> [String; 3] {
        ["--wait".to_owned(), "--timeout".to_owned(), format!("{}s", self.config.deadline.0.as_secs().max(1))]
    }

    /// Asks what an upgrade would make of the release; changes nothing.
    pub(super) async fn render(&self, version: &Version) -> Result<Rendered, StepError> {
        let mut words = self.wanted().await?;
        words.push(if *version >= DRY_RUN_SERVER { "--dry-run=server" } else { "--dry-run" }.to_owned());
        words.extend(["--output".to_owned(), "json".to_owned()]);
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        let answer = self.json(object_of(&self.read(&words).await?), "upgrade --dry-run")?;
        let text = |pointer: &str| answer.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let chart = format!("{}-{}", text("/chart/metadata/name"), text("/chart/metadata/version"));
        let manifest = text("/manifest").to_owned();
        Ok(Rendered { state: state(chart, &answer["config"], &manifest), manifest })
    }

    /// Upgrades the release, or installs it, and waits until it is ready.
    pub(super) async fn upgrade(&self, description: &str) -> Result<(), StepError> {
        let mut words = self.wanted().await?;
        words.extend(self.waiting());
        words.extend(["--description".to_owned(), description.to_owned()]);
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        self.run(&words).await.map(drop)
    }

    /// Rolls the release back to a revision, and waits until it is ready if it can be expected to.
    pub(super) async fn rollback(&self, revision: u64, waits: bool) -> Result<(), StepError> {
        let (revision, most) = (revision.to_string(), self.config.history_max.to_string());
        let [wait, timeout, span] = self.waiting();
        let mut words = vec!["rollback", &self.config.release, &revision, &timeout, &span, "--history-max", &most];
        if waits {
            words.push(&wait);
        }
        self.run(&words).await.map(drop)
    }

    /// Uninstalls the release, and waits until its objects are gone.
    pub(super) async fn uninstall(&self) -> Result<(), StepError> {
        let [wait, timeout, span] = self.waiting();
        self.run(&["uninstall", &self.config.release, &wait, &timeout, &span]).await.map(drop)
    }
}

fn state(chart: String, values: &Value, manifest: &str) -> ReleaseState {
    // No values are said in three ways.
    let values = if values.is_null() { Value::Object(Map::new()) } else { values.clone() };
    let manifest_sha256 = format!("sha256:{}", sha256_hex(manifest.trim().as_bytes()));
    ReleaseState { chart, values_sha256: digest(&values), manifest_sha256 }
}

/// Returns the answer without the lines before it: Helm 3.8 tells there what it pulled from a registry.
fn object_of(answer: &[u8]) -> &[u8] {
    let is_start = |at: usize| answer[at] == b'{' && (at == 0 || answer[at - 1] == b'\n');
    (0..answer.len()).find(|at| is_start(*at)).map_or(answer, |at| &answer[at..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;
    use upgrade_core::testkit::TestContext;

    #[test]
    fn what_is_pulled_is_no_answer() {
        assert_eq!(object_of(b"Pulled: r/{shop}:1\nDigest: sha256:0\n{\"a\":1}\n"), b"{\"a\":1}\n");
        assert_eq!((object_of(b"{}"), object_of(b"null"), object_of(b"")), (&b"{}"[..], &b"null"[..], &b""[..]));
    }

    #[test]
    fn what_helm_reads_is_read_by_nobody_else_and_does_not_stay() {
        let test = TestContext::new("shop");
        let scratch = Scratch::make(&test.forward()).unwrap();
        let path = PathBuf::from(scratch.write("values.json", &Value::Null).unwrap());
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        drop(scratch);
        assert!(!path.exists());
        // What a crash left.
        let left = Scratch::make(&test.forward()).unwrap();
        let (path, beside) = (left.0.clone(), Scratch::make(&test.beside("other").forward()).unwrap());
        std::mem::forget(left);
        Scratch::clear(&test.back()).unwrap();
        assert!(!path.exists() && beside.0.exists());
        Scratch::clear(&test.back()).unwrap();
    }

    #[test]
    fn no_values_are_the_same_however_they_are_said() {
        let of = |values: Value| state("shop-1".into(), &values, "a: 1\n").values_sha256;
        assert_eq!(of(Value::Null), of(Value::Object(Map::new())));
        assert_eq!(state("s".into(), &Value::Null, "a: 1"), state("s".into(), &Value::Null, "\na: 1\n\n"));
    }
}
