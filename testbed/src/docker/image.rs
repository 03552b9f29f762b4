//! Images made from busybox, without a registry.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Engine;

/// Describes an image: busybox, and what its configuration says.
#[derive(Clone, Debug)]
pub struct Image {
    changes: Vec<String>,
    /// Where in the image, and from where on this machine.
    files: Vec<(String, PathBuf)>,
}

impl Image {
    /// An image that runs a shell command and ends at once when it is stopped.
    pub fn shell(script: &str) -> Self {
        let command = format!("CMD [\"/bin/sh\", \"-c\", {}]", quoted(script));
        Self { changes: vec![command, "STOPSIGNAL SIGKILL".into()], files: Vec::new() }
    }

    /// An image that answers `GET /version` with `version` on port 8080.
    pub fn web(version: &str) -> Self {
        Self::shell("mkdir -p /www && echo $VERSION >/www/version && echo ok >/www/health && echo listening && exec httpd -f -p 8080 -h /www")
            .with(&format!("ENV VERSION={version}"))
            .with("EXPOSE 8080")
    }

    /// Adds an instruction: CMD, ENTRYPOINT, ENV, EXPOSE, HEALTHCHECK, LABEL, STOPSIGNAL, USER, VOLUME, WORKDIR.
    #[must_use]
    pub fn with(mut self, instruction: &str) -> Self {
        self.changes.push(instruction.to_owned());
        self
    }

    /// Adds a health check that runs a shell command.
    #[must_use]
    pub fn healthcheck(self, script: &str) -> Self {
        let instruction = format!(
            "HEALTHCHECK --interval=500ms --timeout=2s --retries=2 CMD [\"/bin/sh\", \"-c\", {}]",
            quoted(script)
        );
        self.with(&instruction)
    }

    /// Adds a program of this machine as `/bin/NAME`, with the libraries that it needs.
    ///
    /// # Panics
    /// It does not exist.
    #[must_use]
    pub fn program(self, path: &Path) -> Self {
        let name = path.file_name().expect("a program has a name").to_string_lossy().into_owned();
        self.libraries_of(path).file(&format!("bin/{name}"), path)
    }

    /// Adds a program or library of this machine where it stands, with the libraries that it needs.
    ///
    /// # Panics
    /// It does not exist.
    #[must_use]
    pub fn program_at(self, path: &Path) -> Self {
        self.libraries_of(path).file(path.to_string_lossy().trim_start_matches('/'), path)
    }

    /// Adds a file of this machine at a place in the image.
    #[must_use]
    pub fn file(mut self, place: &str, from: &Path) -> Self {
        if !self.files.iter().any(|(taken, _)| taken == place) {
            self.files.push((place.to_owned(), from.to_owned()));
        }
        self
    }

    fn libraries_of(mut self, path: &Path) -> Self {
        let listed = Command::new("ldd").arg(path).output().expect("ldd can be started");
        for word in String::from_utf8_lossy(&listed.stdout).split_whitespace().filter(|word| word.starts_with('/')) {
            let library = std::fs::canonicalize(word).unwrap_or_else(|error| panic!("{word}: {error}"));
            self = self.file(word.trim_start_matches('/'), &library);
        }
        self
    }

    /// Makes the image on an engine, under a name and tag; returns its id.
    ///
    /// # Panics
    /// There is no static busybox, or the engine refuses it.
    pub fn build(&self, engine: &Engine, name: &str) -> String {
        // A name of its own in it: or two tests that ask for the same would share one image.
        let own = format!("LABEL testbed={}", quoted(name));
        let lines = ["FROM scratch", "ADD root.tar /"].into_iter().chain(self.changes.iter().map(String::as_str));
        let text = lines.chain([own.as_str()]).collect::<Vec<_>>().join("\n");
        let mut context = tar::Builder::new(Vec::new());
        add(&mut context, tar::EntryType::Regular, "Dockerfile", 0o644, None, text.as_bytes());
        add(&mut context, tar::EntryType::Regular, "root.tar", 0o644, None, &root(&self.files));
        let context = context.into_inner().expect("an archive in memory can be written");
        let mut attempt = 1;
        let done = loop {
            let done = send(engine, name, &context);
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            // The builder takes a layer for known that another test's image takes with it at that moment.
            let raced = said.contains("unable to find image") && attempt < 5;
            assert!(done.status.success() || raced, "docker build {name}: {said}");
            if done.status.success() {
                break done;
            }
            attempt += 1;
        };
        let id = String::from_utf8_lossy(&done.stdout).trim().to_owned();
        // Podman leaves the digest's kind out.
        if id.contains(':') { id } else { format!("sha256:{id}") }
    }
}

/// Lets the engine build from an archive.
fn send(engine: &Engine, name: &str, context: &[u8]) -> std::process::Output {
    let mut command = engine.command(["build", "--quiet", "--tag", name, "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let mut input = child.stdin.take().expect("its input is a pipe");
    // What the engine did not want to hear, its answer explains.
    let _ = input.write_all(context);
    drop(input);
    child.wait_with_output().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// A root directory with busybox in it and some files, as an archive.
fn root(files: &[(String, PathBuf)]) -> Vec<u8> {
    let busybox = Path::new("/bin/busybox");
    let program = std::fs::read(busybox).unwrap_or_else(|error| panic!("{}: {error}", busybox.display()));
    let mut archive = tar::Builder::new(Vec::new());
    let mut add = |kind, path: &str, mode, link, contents: &[u8]| add(&mut archive, kind, path, mode, link, contents);
    for directory in ["bin/", "tmp/", "www/", "data/", "etc/"] {
        add(tar::EntryType::Directory, directory, if directory == "tmp/" { 0o1777 } else { 0o755 }, None, &[]);
    }
    add(tar::EntryType::Regular, "bin/busybox", 0o755, None, &program);
    for applet in [
        "sh",
        "cat",
        "echo",
        "sleep",
        "httpd",
        "wget",
        "nc",
        "ls",
        "mkdir",
        "rm",
        "mv",
        "cp",
        "grep",
        "test",
        "true",
        "false",
        "id",
        "env",
        "date",
        "touch",
        "tar",
        "kill",
        "hostname",
        "stat",
        "seq",
        "chown",
        "chmod",
        "ln",
        "dd",
        "sync",
        "find",
        "sort",
        "su",
        "head",
        "tail",
        "tr",
        "wc",
        "printf",
        "sha256sum",
    ] {
        add(tar::EntryType::Symlink, &format!("bin/{applet}"), 0o777, Some("busybox"), &[]);
    }
    add(
        tar::EntryType::Regular,
        "etc/passwd",
        0o644,
        None,
        b"root:x:0:0:root:/:/bin/sh\npostgres:x:999:999::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n",
    );
    for (at, from) in files {
        let contents = std::fs::read(from).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        add(tar::EntryType::Regular, at, 0o755, None, &contents);
    }
    archive.into_inner().expect("an archive in memory can be written")
}

fn add(
    archive: &mut tar::Builder<Vec<u8>>,
    kind: tar::EntryType,
    path: &str,
    mode: u32,
    link: Option<&str>,
    contents: &[u8],
) {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(contents.len() as u64);
    match link {
        Some(link) => archive.append_link(&mut header, path, link),
        None => archive.append_data(&mut header, path, contents),
    }
    .expect("an archive in memory can be written");
}

/// A text as JSON spells it, which the instructions' lists are.
fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}
