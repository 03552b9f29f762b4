//! Secrets that are given by reference, and contents that an upgrade finds: one pipeline of all.

use crate::server;
use crate::world::World;

/// Says how the pipeline goes on once everything is applied.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Good,
    CommandFails,
    ServerFails,
    UndoFails,
    Slow,
}

fn pipeline(world: &World, end: End, commit: &str) {
    world.write(".env", "# kept\nAPI_TOKEN=env-cAnArY-3\nGONE=gone-cAnArY-4\nPORT=80\n");
    world.write("settings.yaml", "db:\n  password: yaml-cAnArY-5 # why-cAnArY-6\n  name: notes\n");
    world.write("legacy.conf", "password = conf-cAnArY-7\n");
    world.write("template.conf", "old=rendered-cAnArY-8\nport=80\n");
    let port = server::start();
    let fails = match end {
        End::CommandFails => "exit 3",
        End::Slow => "touch reached; [ -e go ] || sleep 60",
        _ => "true",
    };
    let undo = if end == End::UndoFails { "exit 4" } else { "true" };
    let status = if matches!(end, End::ServerFails | End::UndoFails) { 200 } else { 500 };
    world
        .write("say", &format!("#!/bin/sh\nenv | sort\nprintf '%s\\n' \"$S\"\nprintf '%s\\n' \"$F $K\" >&2\n{undo}\n"));
    world.write("ask", "#!/bin/sh\nprintf '%s\\n' \"$S $F\"\nprintf '%s\\n' \"$K\" >&2\n");
    for name in ["say", "ask"] {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(world.path(name), std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let secrets = "{ S: { env: NOTES_PASSWORD }, F: { file: password.txt }, K: { env: NOTES_KEY } }";
    let server = format!(
        "uses: http.get, with: {{ url: \"http://127.0.0.1:{port}/\", headers: {{ X-Token: {{ env: NOTES_TOKEN }} }}, \
         status: {status}, facts: {{ token: /token }}, header: {{ x-echo: \"token\" }} }}"
    );
    let text = format!(
        r#"upgrade: notes
to: 1.1.0
checks:
  - {{ id: asked, uses: host.command, with: {{ run: [./ask], env: {secrets} }} }}
steps:
  - id: environment
    uses: host.config
    with:
      path: .env
      rules:
        - rename: {{ path: API_TOKEN, to: TOKEN }}
        - remove: {{ path: GONE }}
        - set: {{ path: KEY, value: {{ file: password.txt }} }}
  - id: settings
    uses: host.config
    with:
      path: settings.yaml
      rules:
        - move: {{ from: db.password, to: database.secret }}
        - set: {{ path: database.password, value: {{ env: NOTES_PASSWORD }} }}
  - {{ id: legacy, uses: host.file, with: {{ path: legacy.conf, state: absent }} }}
  - id: template
    uses: host.file
    with:
      path: template.conf
      template:
        text: "password={{{{ secrets.password }}}}\nkey={{{{ secrets.key }}}}\nport={{{{ port }}}}\n"
        vars: {{ port: 81 }}
        secrets: {{ password: {{ env: NOTES_PASSWORD }}, key: {{ env: NOTES_KEY }} }}
  - id: command
    uses: host.command
    retry: {{ attempts: 1 }}
    with:
      shell: true
      script: |
        ./say || true
        {fails}
      undo: [./say]
      check: [./ask]
      env: {secrets}
    after:
      - {{ {server} }}
commit: {commit}
"#
    );
    world.write("upgrade.yaml", &text);
}

/// Lists where canaries may be: where they were put.
fn places(world: &World) -> Vec<String> {
    let places = world.with_canaries("").into_iter().map(|path| path.to_str().unwrap().to_owned());
    places.filter(|path| !path.starts_with(".upgrade/")).collect()
}

fn looks_at(world: &World) {
    world.upgrade(&["validate", "upgrade.yaml"]).exits(0);
    for format in ["text", "json"] {
        world.upgrade(&["plan", "upgrade.yaml", "-vv", "--output", format]).exits(0);
    }
}

#[test]
fn an_upgrade_that_is_committed_tells_and_keeps_no_secret() {
    for world in [World::new(), World::with_key()] {
        pipeline(&world, End::Good, "{ confirm_within: 1h }");
        looks_at(&world);
        world.upgrade(&["run", "upgrade.yaml", "--detach", "-v"]).exits(6);
        world.ask();
        world.upgrade(&["commit", "-vv", "--output", "json"]).exits(0);
        world.upgrade(&["status", "--watch", "-v"]).exits(0);
        world.ask();
        world.seals_nothing();
        assert_eq!(places(&world), [".env", "password.txt", "settings.yaml", "template.conf"]);
    }
}

#[test]
fn an_upgrade_that_is_rolled_back_tells_and_keeps_no_secret() {
    for (world, end) in [
        (World::new(), End::CommandFails),
        (World::new(), End::ServerFails),
        (World::with_key(), End::CommandFails),
        (World::with_key(), End::ServerFails),
    ] {
        pipeline(&world, end, "now");
        let before = places(&world);
        for format in ["text", "json"] {
            world.upgrade(&["run", "upgrade.yaml", "-vv", "--output", format]).exits(4);
            world.ask();
            world.seals_nothing();
            assert_eq!(places(&world), before);
        }
    }
}

#[test]
fn a_stuck_upgrade_tells_and_keeps_no_secret() {
    let world = World::new();
    pipeline(&world, End::UndoFails, "now");
    let before = places(&world);
    world.upgrade(&["run", "upgrade.yaml", "-v"]).exits(5);
    world.ask();
    world.upgrade(&["resolve", "0", "command", "--retry", "--reason", "again", "-v"]).exits(5);
    world.upgrade(&["resolve", "0", "command", "--skip", "--reason", "by hand", "-v"]);
    world.ask();
    world.seals_nothing();
    assert_eq!(places(&world), before);
}

#[test]
fn a_killed_upgrade_tells_and_keeps_no_secret() {
    for world in [World::new(), World::with_key()] {
        pipeline(&world, End::Slow, "now");
        world.kill_at(&["run", "upgrade.yaml", "-vv"], "reached");
        world.ask();
        std::fs::remove_file(world.path("reached")).unwrap();
        world.kill_at(&["resume", "-v", "--output", "json"], "reached");
        world.ask();
        world.write("go", "");
        world.upgrade(&["resume", "-v"]).exits(0);
        world.ask();
        world.seals_nothing();
    }
}
