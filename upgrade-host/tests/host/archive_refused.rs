//! Archives made to do harm are refused, and nothing outside is touched.

#![cfg(test)]

use std::fs;
use std::path::Path;

use crate::world::{Tar, gz, picture, zst};
use serde_json::json;
use upgrade_core::error::{Class, StepError};
use upgrade_core::registry::BuildContext;
use upgrade_core::step::{Prepared, Step};
use upgrade_core::testkit::TestContext;
use upgrade_host::steps::{Release, ReleaseUndo};

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("site/releases")).unwrap();
        fs::create_dir(directory.path().join("outside")).unwrap();
        fs::write(directory.path().join("outside/sentinel"), "untouched").unwrap();
        fs::write(directory.path().join("site/sentinel"), "untouched").unwrap();
        Self { directory }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn step(&self, with: serde_json::Value) -> Release {
        let mut config = json!({ "root": "site", "version": "2.0.0", "archive": "release.tar" });
        let serde_json::Value::Object(with) = with else { panic!("{with}") };
        config.as_object_mut().unwrap().extend(with);
        Release::from_config(serde_json::from_value(config).unwrap(), &BuildContext::new(self.path())).unwrap()
    }

    async fn prepare(&self, bytes: &[u8], with: serde_json::Value) -> Result<ReleaseUndo, StepError> {
        fs::write(self.path().join("release.tar"), bytes).unwrap();
        let test = TestContext::new("release");
        match self.step(with).prepare(&test.forward()).await? {
            Prepared::Change { undo, .. } => Ok(undo),
            other => panic!("{other:?}"),
        }
    }
}

/// Asks that the archive is refused, in prepare and, should prepare have been passed by, in apply.
async fn refused(bytes: &[u8], reason: &str) {
    refused_with(bytes, json!({}), reason).await;
}

async fn refused_with(bytes: &[u8], with: serde_json::Value, reason: &str) {
    let place = Place::new();
    fs::write(place.path().join("release.tar"), bytes).unwrap();
    let before = picture(place.path());
    let error = place.prepare(bytes, with.clone()).await.expect_err(reason);
    assert_eq!(error.class(), Class::Permanent, "{error}");
    assert!(error.message().contains(reason), "{error} does not say `{reason}`");
    assert!(error.message().contains("release.tar"), "{error} does not name the archive");
    assert!(error.hint().is_some());
    assert_eq!(picture(place.path()), before, "{reason}");

    // The same archive put in the place of a good one between prepare and apply.
    let test = TestContext::new("release");
    let step = place.step(with);
    fs::write(place.path().join("release.tar"), gz(&Tar::default().file("a/app", b"good").end())).unwrap();
    let Prepared::Change { undo, .. } = step.prepare(&test.forward()).await.unwrap() else { panic!() };
    fs::write(place.path().join("release.tar"), bytes).unwrap();
    step.apply(&test.forward(), &undo).await.expect_err(reason);
    assert_eq!(picture(place.path()), before, "{reason}");
}

#[tokio::test]
async fn names_that_lead_outside() {
    for (name, reason) in [
        (&b"../outside/sentinel"[..], "upwards"),
        (b"a/../../outside/sentinel", "upwards"),
        (b"..", "upwards"),
        (b"/etc/passwd", "absolute"),
        (b"a\nb", "control character"),
        (b"a\x1b[31mb", "control character"),
    ] {
        refused(&Tar::default().entry(name, b'0', 0o644, b"", b"x").end(), reason).await;
    }
    refused(&Tar::default().entry(b"", b'0', 0o644, b"", b"x").end(), "empty").await;
    let long =
        Tar::default().entry(b"././@LongLink", b'L', 0, b"", b"../../outside/evil\0").file("innocent", b"x").end();
    refused(&long, "upwards").await;
    let pax = Tar::default().entry(b"pax", b'x', 0, b"", b"27 path=../../outside/evil\n").file("innocent", b"x").end();
    refused(&pax, "upwards").await;
    let pax = Tar::default().entry(b"pax", b'x', 0, b"", b"12 path=a\0b\n").file("innocent", b"x").end();
    refused(&pax, "NUL").await;
    let global =
        Tar::default().entry(b"pax", b'g', 0, b"", b"27 path=../../outside/evil\n").file("innocent", b"x").end();
    refused(&global, "global header").await;
}

#[tokio::test]
async fn links_that_lead_outside() {
    let through = |target: &str| Tar::default().link("out", target).file("out/sentinel", b"evil").end();
    refused(&through("../../../outside"), "leads outside").await;
    refused(&through("/etc"), "absolute").await;
    refused(&Tar::default().link("a", ".").file("a/b", b"evil").end(), "not a directory").await;
    refused(&Tar::default().link("a", "b").file("a", b"evil").end(), "there twice").await;
    refused(&Tar::default().file("b/x", b"").link("a", "b/../../outside").end(), "`..` after a name").await;
    let deep = Tar::default().file("d/e/f", b"").link("d/e/up", "../../..").end();
    refused(&deep, "leads outside").await;
    let hard = |target: &[u8]| Tar::default().file("a", b"x").entry(b"b", b'1', 0o644, target, b"").end();
    refused(&hard(b"../outside/sentinel"), "leads outside").await;
    refused(&hard(b"/etc/passwd"), "leads outside").await;
    refused(&hard(b"nothing"), "not a file before it").await;
    let hard = Tar::default().link("s", "a").entry(b"b", b'1', 0o644, b"s", b"").end();
    refused(&hard, "not a file before it").await;
}

#[tokio::test]
async fn entries_that_are_no_files() {
    for (kind, reason) in
        [(b'3', "device"), (b'4', "device"), (b'6', "named pipe"), (b'S', "sparse"), (b'V', "not known")]
    {
        refused(&Tar::default().entry(b"dev", kind, 0o666, b"", b"").end(), reason).await;
    }
    refused(&Tar::default().file("a", b"1").file("./a", b"2").end(), "there twice").await;
    refused(&Tar::default().file("a", b"1").file("a/b", b"2").end(), "not a directory").await;
    let twice = Tar::default().entry(b"a/", b'5', 0o755, b"", b"").entry(b"a/", b'5', 0o777, b"", b"").end();
    refused(&twice, "there twice").await;
}

#[tokio::test]
async fn archives_that_are_none() {
    let good = Tar::default().file("app", &[7; 5000]).end();
    refused(b"not a tar", "neither").await;
    refused(b"", "neither").await;
    refused(&good[..1536], "cut off").await;
    refused(&good[..good.len() - 1024], "cut off").await;
    let packed = gz(&good);
    refused(&packed[..packed.len() / 2], "damaged").await;
    let mut flipped = packed.clone();
    let middle = flipped.len() - 6;
    flipped[middle] ^= 0x10;
    refused(&flipped, "damaged").await;
    refused(&[&packed[..], b"garbage"].concat(), "damaged").await;
    refused(&[&[0x1f, 0x8b][..], &[0xff; 600]].concat(), "damaged").await;
    let packed = zst(&good);
    refused(&packed[..packed.len() - 3], "damaged").await;
    refused(&[&good[..], b"more"].concat(), "after its end").await;
    let mut wrong = good.clone();
    wrong.splice(0..1, [b'z']);
    refused(&wrong, "neither").await;
    refused(&gz(&wrong), "checksum").await;
    refused(&Tar::default().entry(b"d/", b'5', 0o755, b"", b"").end(), "holds no file").await;
}

#[tokio::test]
async fn bombs() {
    let zeros = Tar::default().file("bomb", &vec![0; 18 << 20]).end();
    refused(&zst(&zeros), "as a bomb does").await;
    refused(&gz(&zeros), "as a bomb does").await;
    refused_with(
        &Tar::default().file("big", &vec![7; 2 << 20]).end(),
        json!({ "max_unpacked": "1MiB" }),
        "more than 1048576 bytes",
    )
    .await;
    // A long name that claims to be a terabyte is refused by its header.
    let mut claimed = Tar::default();
    claimed.header(b"././@LongLink", b'L', 0, b"", 7 << 30);
    refused(&claimed.end(), "too long").await;
    let mut many = Tar::default();
    for _ in 0..20 {
        many = many.entry(b"././@LongLink", b'L', 0, b"", b"a\0");
    }
    refused(&many.file("a", b"").end(), "more headers").await;
}

#[tokio::test]
async fn what_is_harmless_is_unpacked() {
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(120));
    let tar = Tar::default()
        .entry(b"./", b'5', 0o755, b"", b"")
        .entry(b"app-2/bin/run", b'0', 0o6755, b"", b"#!")
        .entry(b"app-2/bin/", b'5', 0o750, b"", b"")
        .link("app-2/lib/up", "../bin/run")
        .entry(b"app-2/copy", b'1', 0o644, b"app-2/bin/run", b"")
        .entry(b"././@LongLink", b'L', 0, b"", format!("app-2/{long}\0").as_bytes())
        .file("short", b"long name")
        .end();
    for bytes in [tar.clone(), gz(&tar), zst(&tar)] {
        let place = Place::new();
        fs::write(place.path().join("release.tar"), &bytes).unwrap();
        let test = TestContext::new("release");
        let step = place.step(json!({ "strip_components": 1 }));
        let Prepared::Change { undo, .. } = step.prepare(&test.forward()).await.unwrap() else { panic!() };
        let output = step.apply(&test.forward(), &undo).await.unwrap();
        let there = picture(&output.path);
        assert!(there[Path::new("bin/run")].contains(" 100755 "), "set-user-id is not kept: {there:?}");
        assert!(there[Path::new("bin")].contains(" 40750 "));
        assert_eq!(fs::read(output.path.join("lib/up")).unwrap(), b"#!");
        assert_eq!(fs::read(output.path.join("copy")).unwrap(), b"#!");
        assert_eq!(fs::read(output.path.join(&long)).unwrap(), b"long name");
        assert!(test.reported().iter().any(|progress| progress.total == Some(bytes.len() as u64)));
    }
}

/// Cuts an archive at every length and flips bits: refused or read, never a panic.
#[tokio::test]
async fn no_damage_makes_it_panic() {
    let place = Place::new();
    let good = Tar::default().file("app", b"content").link("l", "app").end();
    for bytes in [good.clone(), gz(&good), zst(&good)] {
        for at in (0..bytes.len()).step_by(bytes.len() / 60 + 1) {
            let _ = place.prepare(&bytes[..at], json!({})).await;
            for bit in [1, 0x80] {
                let mut flipped = bytes.clone();
                flipped[at] ^= bit;
                let _ = place.prepare(&flipped, json!({})).await;
            }
        }
    }
    assert_eq!(fs::read_dir(place.path().join("site/releases")).unwrap().count(), 0);
}
