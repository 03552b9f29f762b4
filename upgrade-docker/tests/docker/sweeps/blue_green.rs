//! `docker.blue_green`: a switch by names, and one by a proxy.

#![cfg(test)]

use std::cell::RefCell;

use super::{Case, notices_every_seeded_defect, sweep, sweep_between_calls};
use crate::world::Corner;
use upgrade_testbed::docker::Image;

thread_local! {
    /// The images of this test, made once: every world has names of its own for them.
    static IMAGES: RefCell<Option<Corner>> = const { RefCell::new(None) };
}

/// Names images that serve nothing: what is swept is who is there, and under which names.
fn images(corner: &Corner) {
    IMAGES.with_borrow_mut(|made| {
        let made = made.get_or_insert_with(|| {
            let own = Corner::of(&corner.engine, "images");
            for version in ["1.0", "2.0"] {
                let image = Image::shell("exec sleep 1000").with(&format!("ENV VERSION={version}"));
                image.build(&corner.engine, &own.name(&format!("image:{version}")));
            }
            own
        });
        for version in ["image:1.0", "image:2.0"] {
            corner.engine.docker(["tag", &made.name(version), &corner.name(version)]);
        }
    });
}

fn run(corner: &Corner, name: &str, network: &str, label: &str) {
    let name = corner.name(name);
    let image = corner.name("image:1.0");
    let alias = ["--network-alias", "api"];
    let mut arguments = vec!["run", "--detach", "--name", &name, "--label", label, "--network", network];
    arguments.extend(if network == "bridge" { &[][..] } else { &alias[..] });
    arguments.push(&image);
    corner.engine.docker(&arguments);
}

/// Starts a container that a file leads to.
fn serve(corner: &Corner, name: &str) {
    run(corner, name, "bridge", "foreign=no");
    let format = "{{.NetworkSettings.IPAddress}}";
    let address = corner.engine.docker(["inspect", "--format", format, &corner.name(name)]);
    std::fs::create_dir_all(corner.directory()).unwrap();
    for file in ["to", "loaded"] {
        std::fs::write(corner.directory().join(file), format!("server {address}:80;")).unwrap();
    }
}

/// Says who is there, and which names and files lead to whom.
fn observe(corner: &Corner) -> String {
    let filter = format!("name={}", corner.prefix);
    let ids = corner.engine.docker(["ps", "--all", "--quiet", "--filter", &filter]);
    let mut addresses = Vec::new();
    let mut lines = Vec::new();
    for id in ids.lines() {
        let format = "{{.Name}} {{.Config.Image}} {{.State.Status}} {{range $n, $e := .NetworkSettings.Networks}}{{$n}} \
                      {{$e.IPAddress}} {{with $e.IPAMConfig}}{{.IPv4Address}}{{end}} {{$e.Aliases}}{{end}}";
        let line = corner.engine.docker(["inspect", "--format", format, id]);
        let mut words: Vec<_> = line.split(' ').map(str::to_owned).collect();
        addresses.push((std::mem::take(&mut words[4]), words[0].trim_start_matches('/').to_owned()));
        lines.push(words.join(" ").replace(id, "ID"));
    }
    lines.sort_unstable();
    for file in ["to", "loaded"] {
        let mut text = std::fs::read_to_string(corner.directory().join(file)).unwrap_or_default();
        for (address, name) in &addresses {
            text = text.replace(&format!("{address}:"), &format!("{name}:"));
        }
        lines.push(format!("{file}: {text}"));
    }
    lines.join("\n")
}

/// Puts a container of the same name and image in the place of the one that serves.
fn replace(corner: &Corner, network: &str) {
    let image = format!("ancestor={}", corner.name("image:1.0"));
    let ids = corner.engine.docker(["ps", "--all", "--quiet", "--filter", &image]);
    for id in ids.lines() {
        corner.engine.docker(["rm", "--force", id]);
    }
    run(corner, "web", network, "foreign=yes");
}

fn is_foreign(corner: &Corner) -> bool {
    corner.engine.docker(["inspect", "--format", "{{.Config.Labels.foreign}}", &corner.name("web")]) == "yes"
}

const ALIAS: Case = Case {
    setup: |corner| {
        images(corner);
        corner.engine.docker(["network", "create", &corner.name("front")]);
        run(corner, "web", &corner.name("front"), "foreign=no");
    },
    pipeline: r#"
upgrade: names
steps:
  - id: web
    uses: docker.blue_green
    with:
      target: engine
      container: PREFIX-web
      image: "PREFIX-image:2.0"
      pull: never
      switch: { alias: {} }
      drain: 0s
      health: { stable: 0s, every: 50ms }
"#,
    observe,
    interfere: |corner, _| {
        replace(corner, &corner.name("front"));
        true
    },
    survived: |corner, _| is_foreign(corner),
};

const PROXY: Case = Case {
    setup: |corner| {
        images(corner);
        serve(corner, "web");
    },
    pipeline: r#"
upgrade: proxy
steps:
  - id: web
    uses: docker.blue_green
    with:
      target: engine
      container: PREFIX-web
      image: "PREFIX-image:2.0"
      pull: never
      switch:
        proxy:
          file: /tmp/PREFIX/to
          template: "server {{ address }}:{{ port }};"
          port: 80
          check: [test, -s, /tmp/PREFIX/to]
          reload: [cp, /tmp/PREFIX/to, /tmp/PREFIX/loaded]
      drain: 0s
      health: { stable: 0s, every: 50ms }
"#,
    observe,
    interfere: |corner, _| {
        std::fs::write(corner.directory().join("to"), "mine").unwrap();
        true
    },
    survived: |corner, _| std::fs::read_to_string(corner.directory().join("to")).unwrap() == "mine",
};

/// One after the other: that they are undone in the other order can be seen only of two.
const BOTH: Case = Case {
    setup: |corner| {
        (ALIAS.setup)(corner);
        serve(corner, "shop");
    },
    pipeline: r#"
upgrade: both
steps:
  - id: web
    uses: docker.blue_green
    with:
      target: engine
      container: PREFIX-web
      image: "PREFIX-image:2.0"
      pull: never
      switch: { alias: { networks: [PREFIX-front] } }
      drain: 0s
      health: { stable: 0s, every: 50ms }
  - id: shop
    uses: docker.blue_green
    with:
      target: engine
      container: PREFIX-shop
      image: "PREFIX-image:2.0"
      pull: never
      switch:
        proxy:
          file: /tmp/PREFIX/to
          template: "server {{ address }}:{{ port }};"
          port: 80
          reload: [cp, /tmp/PREFIX/to, /tmp/PREFIX/loaded]
      drain: 0s
      health: { stable: 0s, every: 50ms }
"#,
    ..ALIAS
};

#[test]
fn names_are_switched_or_not_at_all() {
    sweep_between_calls(&ALIAS, 10, 15);
}

#[test]
fn a_proxy_is_switched_or_not_at_all() {
    sweep_between_calls(&PROXY, 10, 15);
}

#[test]
#[ignore = "a campaign"]
fn campaign_each_switch_survives_every_crash() {
    sweep(&ALIAS, 1, 40);
    sweep(&PROXY, 1, 40);
    sweep(&BOTH, 1, 80);
}

#[test]
fn every_seeded_defect_is_noticed() {
    notices_every_seeded_defect(&BOTH);
}
