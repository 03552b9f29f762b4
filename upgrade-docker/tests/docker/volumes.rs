//! Volumes with something of everything in them, and what they hold, written down.

#![cfg(test)]

use std::io::{Read as _, Write as _};
use std::process::Stdio;

use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};
use upgrade_core::step::{Prepared, Step as _};
use upgrade_core::testkit::TestContext;
use upgrade_docker::steps::VolumeBackup;
use upgrade_testbed::docker::Image;

use crate::world::{Corner, build_context};

/// Makes the volume `PREFIX-data` with something of everything in it, and the running container
/// `PREFIX-app` that uses it; returns the volume's name.
pub(crate) fn with_app(corner: &Corner) -> String {
    let (volume, app, image) = (corner.name("data"), corner.name("app"), corner.name("image:1"));
    Image::shell("sleep 1000").build(&corner.engine, &image);
    let mount = format!("{volume}:/data");
    corner.engine.docker(["volume", "create", "--label", "kept=yes", &volume]);
    corner.engine.docker(["create", "--network", "none", "--name", &app, "--volume", &mount, &image]);
    fill(corner, &app, "one");
    corner.engine.docker(["start", &app]);
    volume
}

/// Writes something of everything to `/data` of a container.
pub(crate) fn fill(corner: &Corner, container: &str, text: &str) {
    let mut archive = Builder::new(Vec::new());
    let mut add = |kind: EntryType, name: &str, mode, owner, link: &str, content: &[u8]| {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner + 1);
        header.set_mtime(1_600_000_000 + owner);
        header.set_size(content.len() as u64);
        match link {
            "" => archive.append_data(&mut header, name, content).unwrap(),
            link => archive.append_link(&mut header, name, link).unwrap(),
        }
    };
    let long = format!("data/deep/{}", "n".repeat(180));
    add(EntryType::Directory, "data/", 0o750, 70, "", b"");
    add(EntryType::Directory, "data/deep/", 0o2770, 999, "", b"");
    add(EntryType::Regular, "data/deep/text", 0o640, 70, "", text.as_bytes());
    add(EntryType::Regular, "data/large", 0o600, 70, "", &text.repeat(1 << 18).into_bytes());
    add(EntryType::Regular, &long, 0o604, 3_000_000, "", b"long");
    add(EntryType::Link, "data/hard", 0o640, 70, "data/deep/text", b"");
    add(EntryType::Symlink, "data/link", 0o777, 0, "deep/../nowhere", b"");
    add(EntryType::Fifo, "data/pipe", 0o620, 3, "", b"");
    let archive = archive.into_inner().unwrap();
    let mut command = corner.engine.command(["cp", "--archive", "-", &format!("{container}:/")]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(&archive).unwrap();
    assert!(child.wait().unwrap().success());
}

/// Writes a file to `/data` of a container, as somebody else.
pub(crate) fn write(corner: &Corner, container: &str, name: &str, text: &str) {
    let script = format!("echo {text} >/data/{name}");
    corner.engine.docker(["exec", container, "/bin/sh", "-c", &script]);
}

/// Writes down what is in `/data` of a container: names, modes, owners, times, links, contents.
pub(crate) fn picture(corner: &Corner, container: &str) -> String {
    let done = corner.engine.command(["cp", &format!("{container}:/data"), "-"]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let mut lines = Vec::new();
    for entry in tar::Archive::new(&*done.stdout).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        let header = entry.header();
        let link = entry.link_name().unwrap().map(|link| format!(" -> {}", link.display())).unwrap_or_default();
        lines.push(format!(
            "{} {:?} {:o} {}:{} {} {:x?}{link}",
            entry.path().unwrap().display(),
            header.entry_type(),
            header.mode().unwrap(),
            header.uid().unwrap(),
            header.gid().unwrap(),
            header.mtime().unwrap(),
            &Sha256::digest(&content)[..4],
        ));
    }
    lines.sort();
    lines.join("\n")
}

/// Writes down what stands in a corner: containers with their state, volumes with their labels.
pub(crate) fn standing(corner: &Corner) -> String {
    let containers = corner.list(&["ps", "--all"], "{{.Names}} {{.State}}");
    let volumes = corner.list(&["volume", "ls"], "{{.Name}} {{.Driver}} {{.Labels}}");
    [containers, volumes].concat().join("\n")
}

/// Makes a backup of a volume that [`fill`] filled with `text`, at a place; returns its digest.
pub(crate) fn backup_of(corner: &Corner, text: &str, to: &std::path::Path) -> String {
    let (volume, source, image) = (corner.name("source"), corner.name("source"), corner.name("image:1"));
    Image::shell("sleep 1000").build(&corner.engine, &image);
    let mount = format!("{volume}:/data");
    corner.engine.docker(["volume", "create", "--label", "of=backup", &volume]);
    corner.engine.docker(["create", "--network", "none", "--name", &source, "--volume", &mount, &image]);
    fill(corner, &source, text);
    let with = serde_json::json!({ "target": "engine", "volume": volume, "to": to });
    let config = serde_json::from_value(with).unwrap();
    let step = VolumeBackup::from_config(config, &build_context(corner.engine.host())).unwrap();
    let test = TestContext::new("source");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let output = runtime.block_on(async {
        let Prepared::Change { undo, .. } = step.prepare(&test.forward()).await.unwrap() else { unreachable!() };
        step.apply(&test.forward(), &undo).await.unwrap()
    });
    corner.engine.docker(["rm", &source]);
    corner.engine.docker(["volume", "rm", &volume]);
    output.sha256
}
