//! `docker.image` with `load`, and `docker.image_save`, on a real engine.

#![cfg(test)]

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use upgrade_core::step::{Prepared, Rollback as _, Step as _};
use upgrade_docker::steps::{Image, ImageSave, ImageSaveConfig, ImageSaveUndo};
use upgrade_testbed::docker;

use crate::image_build::World;
use crate::world::{build_context, golden};

/// Saves two images of the corner into one archive and removes the second from the engine; returns
/// its path and the second's id.
fn archive(world: &World) -> (String, String) {
    let engine = &world.corner.engine;
    let second = world.corner.name("second:1");
    let id = docker::Image::web("2").build(engine, &second);
    let path = world.corner.directory().join("two.tar").display().to_string();
    engine.docker(["save", "--output", &path, &world.corner.name("base:1"), &second]);
    engine.docker(["image", "rm", "--force", &second]);
    (path, id)
}

fn sha256(path: &str) -> String {
    upgrade_core::sealed::sha256_hex(&fs::read(path).unwrap())
}

#[tokio::test]
async fn an_image_is_loaded_and_no_other_tag_moves() {
    let Some(world) = World::new("loads", "") else { return };
    let (path, id) = archive(&world);
    // By now the archive's first name leads elsewhere.
    let third = docker::Image::web("3").build(&world.corner.engine, &world.corner.name("base:1"));
    let before = world.names();
    let packed = format!("{path}.zst");
    fs::write(&packed, zstd::encode_all(&*fs::read(&path).unwrap(), 3).unwrap()).unwrap();
    for path in [&path, &packed] {
        let load = json!({ "archive": path, "sha256": sha256(path), "name": world.corner.name("second:1") });
        let step = world.make(&json!({ "load": load }));
        let undo = world.prepare(&step).await;
        let loaded = undo.loaded.clone().unwrap();
        if !path.ends_with(".zst") {
            let read = golden(
                "docker.image.undo.v1.load.json",
                &undo,
                &[(&loaded.sha256, &"a".repeat(64)), (&loaded.image_id, &format!("sha256:{}", "0".repeat(64)))],
            );
            Image::read_undo(1, read).unwrap();
        }
        for _ in 0..2 {
            let output = step.apply(&world.test.forward(), &undo).await.unwrap();
            assert_eq!((&output.image_id, world.id(&world.corner.name("app:current"))), (&id, id.clone()));
        }
        assert_eq!(world.id(&world.corner.name("base:1")), third);
        assert!(!world.names().contains(&"P-second:1".to_owned()), "{:?}", world.names());
        for _ in 0..2 {
            step.rollback(&world.test.back(), &undo, None).await.unwrap();
            assert_eq!(world.names(), before);
            assert!(!world.corner.engine.command(["image", "inspect", &id]).output().unwrap().status.success());
        }
    }
    let step = world.make(&json!({ "load": { "archive": path, "name": world.corner.name("second:1") } }));
    let undo = world.prepare(&step).await;
    step.apply(&world.test.forward(), &undo).await.unwrap();
    step.commit(&world.test.commit(), &undo).await.unwrap();
    assert_eq!(world.names().len(), before.len() + 1, "{:?}", world.names());
    let answer = step.prepare(&world.test.forward()).await.unwrap();
    assert!(matches!(&answer, Prepared::Unchanged { output, .. } if output.image_id == id), "{answer:?}");
}

#[tokio::test]
async fn an_archive_that_is_not_meant_says_so_before_anything_changes() {
    let Some(world) = World::new("unfit", "") else { return };
    let (path, _) = archive(&world);
    let below = world.corner.directory();
    let write = |name: &str, bytes: &[u8]| {
        fs::write(below.join(name), bytes).unwrap();
        below.join(name).display().to_string()
    };
    let whole = fs::read(&path).unwrap();
    let cut = write("cut.tar", &whole[..whole.len() / 2]);
    let text = write("text.tar", b"not a tar at all");
    let mut other = tar::Builder::new(Vec::new());
    other.append_path_with_name(below.join("text.tar"), "text").unwrap();
    let other = write("other.tar", &other.into_inner().unwrap());
    let missing = below.join("missing.tar").display().to_string();
    for (load, message, hint) in [
        (json!({ "archive": path, "sha256": "0".repeat(64) }), "and 0000", "load.sha256"),
        (json!({ "archive": path }), "has several images, and none is", "load.name"),
        (json!({ "archive": path, "name": "web:9" }), "has no image web:9", "load.name"),
        (json!({ "archive": cut }), "is damaged", "docker save"),
        (json!({ "archive": text }), "is damaged", "docker save"),
        (json!({ "archive": other }), "has no manifest.json", "docker save"),
        (json!({ "archive": missing }), "cannot read", "path"),
    ] {
        let step = world.make(&json!({ "load": load }));
        let error = step.prepare(&world.test.forward()).await.unwrap_err();
        assert!(error.message().contains(message) && error.hint().unwrap().contains(hint), "{load}: {error:?}");
    }
    let named = json!({ "archive": path, "name": world.corner.name("base:1") });
    let step = world.make(&json!({ "load": named, "platform": "linux/s390x" }));
    let error = step.prepare(&world.test.forward()).await.unwrap_err();
    assert!(error.message().contains("linux/s390x is needed"), "{error:?}");
    assert_eq!(world.names(), ["P-base:1"]);
}

fn save(world: &World, to: &Path) -> ImageSave {
    let config: Value = json!({ "target": "engine", "image": world.corner.name("base:1"), "to": to });
    let config: ImageSaveConfig = serde_json::from_value(config).unwrap();
    ImageSave::from_config(config, &build_context(world.corner.engine.host())).unwrap()
}

async fn prepare_save(world: &World, step: &ImageSave) -> ImageSaveUndo {
    match step.prepare(&world.test.forward()).await {
        Ok(Prepared::Change { undo, .. }) => undo,
        other => panic!("{:?}", other.map(drop)),
    }
}

#[tokio::test]
async fn an_image_is_saved_so_that_it_is_loaded_again() {
    let Some(world) = World::new("saves", "") else { return };
    let id = world.id(&world.corner.name("base:1"));
    let below = world.corner.directory().join("out");
    for name in ["app.tar", "app.tar.gz", "app.tar.zst"] {
        let to = below.join(name);
        let step = save(&world, &to);
        let undo = prepare_save(&world, &step).await;
        if name == "app.tar" {
            let (path, prefix) = (to.display().to_string(), below.display().to_string());
            let read = golden(
                "docker.image_save.undo.v1.json",
                &undo,
                &[
                    (&path, "/var/lib/shop/app.tar"),
                    (&prefix, "/var/lib/shop"),
                    (&id, &format!("sha256:{}", "0".repeat(64))),
                ],
            );
            ImageSave::read_undo(1, read).unwrap();
        }
        let output = step.apply(&world.test.forward(), &undo).await.unwrap();
        let again = step.apply(&world.test.forward(), &undo).await.unwrap();
        assert_eq!(output, again);
        assert_eq!((output.sha256.as_str(), output.image_id.as_str()), (&*sha256(to.to_str().unwrap()), &*id));
        for _ in 0..2 {
            step.rollback(&world.test.back(), &undo, Some(&output)).await.unwrap();
            assert!(!below.exists());
        }
    }
    // One that is there is kept, put back, and removed when that is final.
    fs::create_dir_all(&below).unwrap();
    let to = below.join("app.tar");
    fs::write(&to, "the last release").unwrap();
    let step = save(&world, &to);
    let undo = prepare_save(&world, &step).await;
    step.apply(&world.test.forward(), &undo).await.unwrap();
    for _ in 0..2 {
        step.rollback(&world.test.back(), &undo, None).await.unwrap();
        assert_eq!((fs::read(&to).unwrap(), fs::read_dir(&below).unwrap().count()), (b"the last release".to_vec(), 1));
    }
    step.apply(&world.test.forward(), &undo).await.unwrap();
    // Somebody else's file is not ours to remove.
    let ours = fs::read(&to).unwrap();
    fs::write(&to, "of somebody else").unwrap();
    let error = step.rollback(&world.test.back(), &undo, None).await.unwrap_err();
    assert!(error.as_conflict().is_some(), "{error:?}");
    fs::write(&to, &ours).unwrap();
    for _ in 0..2 {
        step.commit(&world.test.commit(), &undo).await.unwrap();
        assert_eq!(fs::read_dir(&below).unwrap().count(), 1);
    }
    world.corner.engine.docker(["load", "--input", to.to_str().unwrap()]);
    let answer = step.prepare(&world.test.forward()).await.unwrap();
    assert!(matches!(&answer, Prepared::Unchanged { output, .. } if output.image_id == id), "{answer:?}");
}
