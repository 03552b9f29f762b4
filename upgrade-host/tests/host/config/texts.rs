//! `host.config` on texts as people write them.

#![cfg(test)]

use serde_json::json;
use upgrade_core::registry::BuildContext;
use upgrade_host::steps::Config;

use super::migrate;

#[tokio::test]
async fn yaml_of_every_style() {
    for (text, rule, expected) in [
        ("a: |\n  x\n  y\nb: 1\n", json!({ "set": { "path": "a", "value": "z" } }), "a: z\nb: 1\n"),
        ("a: |\n  x\n  y\nb: 1\n", json!({ "remove": { "path": "a" } }), "b: 1\n"),
        ("a: >\n  x\n  y\nb: 1\n", json!({ "rename": { "path": "a", "to": "c" } }), "c: >\n  x\n  y\nb: 1\n"),
        ("a: &x 1\nb: *x\nc: 2\n", json!({ "set": { "path": "c", "value": 3 } }), "a: &x 1\nb: *x\nc: 3\n"),
        ("server:\n", json!({ "set": { "path": "server.port", "value": 1 } }), "server:\n  port: 1\n"),
        ("", json!({ "set": { "path": "a.b", "value": "yes" } }), "a:\n  b: \"yes\"\n"),
        ("# only\n", json!({ "set": { "path": "a", "value": 1 } }), "# only\na: 1\n"),
        ("a: {b: 1, c: 2}\n", json!({ "remove": { "path": "a.c" } }), "a: {b: 1}\n"),
        ("a: {b: 1, c: 2}\n", json!({ "remove": { "path": "a.b" } }), "a: {c: 2}\n"),
        ("a: {b: 1}\n", json!({ "set": { "path": "a.c", "value": 2 } }), "a: {b: 1, c: 2}\n"),
        ("a: [1, 2, 3]\n", json!({ "remove": { "path": "a[1]" } }), "a: [1, 3]\n"),
        ("a:\n  b: 1\n", json!({ "remove": { "path": "a.b" } }), "a: {}\n"),
        ("- a: 1\n  b: 2\n", json!({ "remove": { "path": "[0].a" } }), "- b: 2\n"),
        ("a: 1\r\nb: 2\r\n", json!({ "set": { "path": "c", "value": 3 } }), "a: 1\r\nb: 2\r\nc: 3\r\n"),
        ("\"a.b\": 1\n", json!({ "set": { "path": "\"a.b\"", "value": 2 } }), "\"a.b\": 2\n"),
        (
            "a: 1",
            json!({ "set": { "path": "b", "value": {"c": [1, {"d": 2}]} } }),
            "a: 1\nb:\n  c:\n    - 1\n    - { d: 2 }",
        ),
        ("a:\n  b: 1\n", json!({ "set": { "path": "a", "value": 5 } }), "a: 5\n"),
    ] {
        let migrated = migrate("c.yaml", text, &json!([rule])).await;
        assert_eq!(migrated.as_deref(), Ok(expected), "{rule} on {text:?}");
    }
}

/// Whatever is in the text: a change is made as asked or refused, and comes back byte for byte.
#[tokio::test]
async fn strange_texts_are_edited_or_refused() {
    let texts = [
        ("c.yaml", "base: &base\n  a: 1\nsub:\n  <<: *base\n  b: 2\n"),
        ("c.yaml", "a: &anchor\n  b: 1\n"),
        ("c.yaml", "a: !custom\n  b: 1\n"),
        ("c.yaml", "a: !!str 5\nb: !x [1]\n"),
        ("c.yaml", "? a\n: 1\n? b\n: 2\n"),
        ("c.yaml", "? [a, b]\n: 1\n"),
        ("c.yaml", "a: 1\n---\na: 2\n"),
        ("c.yaml", "---\na:\n- b: 1\n- - x\n  - y\n...\n"),
        ("c.yaml", "%YAML 1.2\n---\na: 1\n"),
        ("c.yaml", "\u{feff}a: 1\n"),
        ("c.yaml", "{\n  a: 1, # one\n  b: [\n    2\n  ]\n}\n"),
        ("c.yaml", "a: |+\n  text\n\n\n"),
        ("c.yaml", "a: \"x\\\n  y\"\nb: 'it''s'\n"),
        ("c.yaml", "8080: a\ntrue: b\nnull: c\n"),
        ("c.yaml", "a: 1\na: 2\n"),
        ("c.yaml", "a: .nan\nb: .inf\nc: 0o17\nd: 1e3\ne: 2020-01-01\n"),
        ("c.yaml", "just text\n"),
        ("c.yaml", "\ta: 1\n"),
        ("c.json", "[1, {\"a\": 1,},]"),
        ("c.json", "/* only */"),
        ("c.json", "{\"a\": 1e999, \"b\": 123456789012345678901234567890}"),
        ("c.json", "{\"\\u0061\": {\"b\": \"\\ud83d\\ude00\"}}"),
        ("c.json", "{'a': 0x1}"),
        ("c.toml", "a.b = 1\na.c = 2\n[x.y]\nz = 1979-05-27T07:32:00Z\n[x]\nw = nan\n"),
        ("c.toml", "a = { b = 1, c = [ # in\n 2 ] }\nb = \"\"\"\nx\ny\"\"\"\n"),
        ("c.toml", "[[a]]\nb = 1\n[[a.c]]\nd = 1\n[[a]]\n"),
        (".env", "A=\nB=#x\nC= #y\nexport  D = 'z' # w\r\nA=2\nE=\"a\\nb\""),
    ];
    for (name, text) in texts {
        for path in [
            "a", "b", "A", "a.b", "sub.a", "sub.b", "a[0]", "a[1].b", "x", "x.y.z", "[1].a", "a.c", "E", "D",
            "\"8080\"",
        ] {
            for rule in [
                json!({ "set": { "path": path, "value": "new: value" } }),
                json!({ "set": { "path": path, "value": { "k": [true, null] } } }),
                json!({ "rename": { "path": path, "to": "n" } }),
                json!({ "move": { "from": path, "to": "m" } }),
                json!({ "remove": { "path": path } }),
                json!({ "retype": { "path": path, "to": "string" } }),
            ] {
                let config = json!({ "path": name, "rules": [rule] });
                if Config::from_config(serde_json::from_value(config).unwrap(), &BuildContext::default()).is_ok() {
                    let _ = migrate(name, text, &json!([rule])).await;
                }
            }
        }
    }
}

#[tokio::test]
async fn a_moved_value_keeps_the_comment_behind_it() {
    let text = "listen = \":80\" # behind the proxy\n\n[server]\nworkers = 4\n";
    let moved = migrate("c.toml", text, &json!([{ "move": { "from": "listen", "to": "server.listen" } }])).await;
    assert_eq!(moved.unwrap(), "\n[server]\nworkers = 4\nlisten = \":80\" # behind the proxy\n");
}
