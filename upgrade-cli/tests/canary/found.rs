//! Contents that an upgrade finds and cannot make sense of: what is wrong with them is told, and not what they hold.

use crate::world::World;

fn fails_without_telling(file: &str, text: &str, rules: &str) {
    let world = World::new();
    world.write(file, text);
    world.write(
        "upgrade.yaml",
        &format!(
            "upgrade: notes\nto: 1.1.0\nsteps:\n  - {{ id: settings, uses: host.config, with: {{ path: {file}, {rules} }} }}\n"
        ),
    );
    for format in ["text", "json"] {
        world.upgrade(&["plan", "upgrade.yaml", "-vv", "--output", format]);
        let ran = world.upgrade(&["run", "upgrade.yaml", "-vv", "--output", format]);
        ran.exits(4).says(file);
    }
    world.ask();
    world.seals_nothing();
}

const SET: &str = "rules: [{ set: { path: a, value: 1 } }]";

#[test]
fn a_configuration_that_does_not_read_is_not_quoted() {
    for (file, text) in [
        (".env", "PASSWORD=\"cAnArY-1\nB=2\n"),
        (".env", "cAnArY-2 no assignment\n"),
        ("x.json", "{\"password\": \"cAnArY-3\" \"x\"}"),
        ("x.json", "{\"password\": cAnArY-4}"),
        ("x.json", "cAnArY"),
        ("x.toml", "password = cAnArY-5\n"),
        ("x.toml", "password = \"cAnArY-6\nb = 1\n"),
        ("x.toml", "password = \"cAnArY-7\"\npassword = \"cAnArY-8\"\n"),
        ("x.yaml", "password: \"cAnArY-9\n  b: [\n"),
        ("x.yaml", "password: [cAnArY-10\nb: c: d\n"),
        ("x.yaml", "password: !cAnArY-11 x\na: *cAnArY-12\n"),
    ] {
        fails_without_telling(file, text, SET);
    }
}

#[test]
fn a_value_that_stands_in_the_way_of_a_rule_is_not_quoted() {
    for (file, text) in [
        (".env", "a=cAnArY-1\n"),
        ("x.json", "{\"a\": \"cAnArY-2\"}"),
        ("x.toml", "a = \"cAnArY-3\"\n"),
        ("x.yaml", "a: cAnArY-4\n"),
    ] {
        fails_without_telling(file, text, "rules: [{ retype: { path: a, to: integer } }]");
        fails_without_telling(
            file,
            text,
            "validate: { types: { a: integer } }, rules: [{ set: { path: b, value: 1 } }]",
        );
        if file != ".env" {
            fails_without_telling(file, text, "rules: [{ set: { path: a.b, value: 1 } }]");
            fails_without_telling(file, text, "rules: [{ set: { path: \"a[0]\", value: 1 } }]");
        }
    }
}
