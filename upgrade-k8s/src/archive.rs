//! A backup of objects in one file: a first line that says what it is, and the objects as manifests.
//!
//! ```text
//! # k8s.backup {"format":1,"made_by":"…","cluster":"…","namespace":"shop",…,"sha256":"…"}
//! ---
//! apiVersion: v1
//! kind: ConfigMap
//! ```
//!
//! The first line is a comment of YAML, so that `kubectl apply --filename` takes the file as it is. With a
//! key, all after the first line is encrypted, and the line itself bound to it: a file whose Secrets alone
//! were hidden would still show what people put into ConfigMaps.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::journal::cipher::Cipher;
use upgrade_core::sealed::sha256_hex;
use upgrade_core::secret::{ExposeSecret, SecretRef};

use crate::manifest::Manifest;
use crate::object::{Object, canonical};
use crate::selection::Selection;

/// What the first line begins with.
const MAGIC: &str = "# k8s.backup ";
/// The newest format that this code reads, and the one that it writes.
const FORMAT: u32 = 1;

/// Says what a backup holds, and where it is from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Header {
    pub(crate) format: u32,
    /// The run and the step that made it.
    pub(crate) made_by: String,
    pub(crate) created: String,
    /// What tells the cluster from others.
    pub(crate) cluster: String,
    pub(crate) namespace: String,
    #[serde(flatten)]
    pub(crate) selection: Selection,
    /// How many objects it holds.
    pub(crate) objects: u64,
    pub(crate) encrypted: bool,
    /// The digest of all that follows the first line.
    pub(crate) sha256: String,
}

impl Header {
    /// Makes one, but for what only [`write`] knows.
    pub(crate) fn new(cx: &Context, cluster: String, namespace: String, selection: Selection) -> Self {
        let created = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let made_by = cx.marker();
        let (objects, encrypted, sha256) = (0, false, String::new());
        Self { format: FORMAT, made_by, created, cluster, namespace, selection, objects, encrypted, sha256 }
    }

    fn json(&self) -> String {
        serde_json::to_string(self).expect("a header is text and numbers")
    }

    /// Stands for the header in what is encrypted under it.
    fn binding(&self) -> String {
        sha256_hex(Self { sha256: String::new(), ..self.clone() }.json().as_bytes())
    }
}

/// Reads the key by which backups are encrypted.
///
/// # Errors
/// The reference cannot be resolved, or is to something else.
pub(crate) async fn cipher(cx: &Context, key: Option<&SecretRef>) -> Result<Option<Cipher>, StepError> {
    let Some(key) = key else { return Ok(None) };
    let secret = cx.secret(key).await?;
    Cipher::from_hex(secret.expose_secret()).map(Some).map_err(|error| {
        StepError::permanent(format!("the key {key} cannot be used"))
            .with_cause(&error)
            .with_hint("a key has 64 hexadecimal digits: `openssl rand -hex 32` makes one")
    })
}

/// Writes a backup.
///
/// # Errors
/// The system has no random numbers to give.
pub(crate) fn write(mut header: Header, objects: &[Object], cipher: Option<&Cipher>) -> Result<Vec<u8>, StepError> {
    let documents: String = objects.iter().map(document).collect();
    header.objects = objects.len() as u64;
    header.encrypted = cipher.is_some();
    let body = match cipher {
        None => documents.into_bytes(),
        Some(cipher) => cipher
            .seal(&header.binding(), documents.as_bytes())
            .map_err(|error| StepError::transient("the backup cannot be encrypted").with_cause(&error))?,
    };
    header.sha256 = sha256_hex(&body);
    Ok([MAGIC.as_bytes(), header.json().as_bytes(), b"\n", &body].concat())
}

/// Writes an object as YAML; what a reader of YAML would take for something else, as JSON.
fn document(object: &Object) -> String {
    // In the order of `kubectl get --output yaml`.
    let ordered = canonical(&object.0);
    let yaml = serde_saphyr::to_string(&ordered).unwrap_or_default();
    let is_same = Manifest::parse(&yaml, "").is_ok_and(|read| read.len() == 1 && read[0].object == *object);
    let text = if is_same { yaml } else { format!("{ordered:#}") };
    format!("---\n{}\n", text.trim_end_matches('\n'))
}

/// Takes a backup apart, and makes sure that it is whole.
///
/// # Errors
/// It is none, of a later format, or damaged.
pub(crate) fn header<'a>(file: &'a [u8], origin: &str) -> Result<(Header, &'a [u8]), StepError> {
    let no_backup = || {
        StepError::permanent(format!("{origin} is no backup of k8s.backup"))
            .with_hint("name one that `k8s.backup` made; manifests of another origin are what `k8s.apply` takes")
    };
    let rest = file.strip_prefix(MAGIC.as_bytes()).ok_or_else(no_backup)?;
    let end = rest.iter().position(|byte| *byte == b'\n').ok_or_else(|| damaged(origin))?;
    let (line, body) = (&rest[..end], &rest[end + 1..]);
    let value: Value = serde_json::from_slice(line).map_err(|_| damaged(origin))?;
    let format = value["format"].as_u64().unwrap_or_default();
    if format > u64::from(FORMAT) {
        return Err(StepError::permanent(format!("{origin} has format {format}; this program reads up to {FORMAT}"))
            .with_hint("restore it with the version of this program that made it, or a later one"));
    }
    let header: Header = serde_json::from_value(value).map_err(|_| damaged(origin))?;
    if sha256_hex(body) == header.sha256 { Ok((header, body)) } else { Err(damaged(origin)) }
}

/// Reads a backup.
///
/// # Errors
/// As [`header`]; it is encrypted, and the key is another one or none.
pub(crate) fn read(file: &[u8], cipher: Option<&Cipher>, origin: &str) -> Result<(Header, Vec<Object>), StepError> {
    let (header, body) = header(file, origin)?;
    let opened = match (header.encrypted, cipher) {
        (false, _) => body.to_vec(),
        (true, None) => {
            return Err(StepError::permanent(format!("{origin} is encrypted"))
                .with_hint("name the key that it was made with: `key: { file: /etc/upgrade/backup.key }`"));
        }
        (true, Some(cipher)) => cipher.open(&header.binding(), body).map_err(|error| {
            StepError::permanent(format!("{origin} cannot be decrypted"))
                .with_cause(&error)
                .with_hint("name the key that it was made with; with the right one, its first line was changed")
        })?,
    };
    let text = String::from_utf8(opened).map_err(|_| damaged(origin))?;
    let objects: Vec<_> = Manifest::parse(&text, origin)?.into_iter().map(|manifest| manifest.object).collect();
    if objects.len() as u64 == header.objects { Ok((header, objects)) } else { Err(damaged(origin)) }
}

fn damaged(origin: &str) -> StepError {
    StepError::permanent(format!("{origin} is damaged: it is not what its first line says")).with_hint(
        "take another backup; `kubectl apply --dry-run=server --filename FILE` shows what a changed one holds",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use upgrade_core::testkit::TestContext;

    fn sample() -> (Header, Vec<Object>) {
        let cx = TestContext::new("keep").forward();
        let selection = Selection { kinds: vec!["ConfigMap".into()], selector: String::new(), exclude: Vec::new() };
        let header = Header::new(&cx, "cluster u".into(), "shop".into(), selection);
        let texts = [
            "on",
            "yes",
            "null",
            "~",
            "1e3",
            "0o17",
            "1_000",
            "12:30:45",
            "2026-01-01",
            "",
            " lead",
            "trail ",
            "a\n",
            "a\n\n",
            "\n a",
            "a: b",
            "# c",
            "---",
            "--- a\n---\n",
            "tab\there",
            "\u{7f}\u{85}\u{feff}\u{2028}",
            "é😀",
            "{{ x }}",
            "%a",
            "@a",
            "`a`",
            "a\r\nb",
            "&a",
            "*a",
            "!a",
            "| a",
            "> a",
            "'",
            "\"",
            "\\",
        ];
        let data: serde_json::Map<_, _> =
            texts.iter().enumerate().map(|(at, text)| (format!("k{at}"), json!(text))).collect();
        let long = "word ".repeat(60) + "\n  indented\n" + &"x".repeat(200);
        let objects = vec![
            Object(json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "a" }, "data": data })),
            Object(
                json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "b" }, "data": { "long": long } }),
            ),
            Object(json!({ "apiVersion": "example.com/v1", "kind": "Widget", "metadata": { "name": "c" },
                "spec": { "share": 0.1, "whole": 1.0, "big": 9_007_199_254_740_993_i64, "on": true, "none": null, "list": [[], {}] } })),
        ];
        (header, objects)
    }

    #[test]
    fn what_is_read_is_what_was_written() {
        let (header, objects) = sample();
        let file = write(header.clone(), &objects, None).unwrap();
        let (found, read_back) = read(&file, None, "x").unwrap();
        assert_eq!((found.made_by, found.objects, found.encrypted), (header.made_by, 3, false));
        assert_eq!(read_back, objects);
        assert!(String::from_utf8(file).unwrap().contains("\nkind: ConfigMap\n"), "it is YAML");
    }

    #[test]
    fn an_encrypted_one_shows_nothing_and_is_read_with_its_key_alone() {
        let (header, objects) = sample();
        let (key, other) = (Cipher::from_hex(&"1".repeat(64)).unwrap(), Cipher::from_hex(&"2".repeat(64)).unwrap());
        let file = write(header, &objects, Some(&key)).unwrap();
        assert!(!String::from_utf8_lossy(&file).contains("indented"));
        assert_eq!(read(&file, Some(&key), "x").unwrap().1, objects);
        for (cipher, says, hint) in [(None, "is encrypted", "key:"), (Some(&other), "cannot be decrypted", "key")] {
            let error = read(&file, cipher, "x").unwrap_err();
            assert!(error.message().contains(says) && error.hint().unwrap().contains(hint), "{error:?}");
        }
        let text = |file: &[u8]| file.iter().map(|byte| char::from(*byte)).collect::<String>();
        let moved: Vec<u8> = text(&file).replace("\"shop\"", "\"else\"").chars().map(|c| c as u8).collect();
        let error = read(&moved, Some(&key), "x").unwrap_err();
        assert!(error.message().contains("cannot be decrypted"), "the first line is bound to the rest: {error:?}");
    }

    #[test]
    fn one_of_the_first_format_is_read() {
        let file = include_bytes!("../tests/golden/k8s.backup.v1.yaml.sealed");
        let key = Cipher::from_hex(&"1".repeat(64)).unwrap();
        let (header, objects) = read(file, Some(&key), "x").unwrap();
        assert_eq!((header.format, header.namespace.as_str(), objects), (1, "shop", sample().1));
    }

    #[test]
    fn what_is_damaged_or_none_is_said() {
        let (header, objects) = sample();
        let file = write(header, &objects, None).unwrap();
        for cut in [file.len() - 1, file.len() / 2, 40] {
            assert!(read(&file[..cut], None, "x").unwrap_err().message().contains("damaged"), "{cut}");
        }
        assert!(read(b"apiVersion: v1", None, "x").unwrap_err().hint().unwrap().contains("k8s.apply"));
        let text = String::from_utf8(file).unwrap();
        let later = text.replace("\"format\":1", "\"format\":9");
        assert!(read(later.as_bytes(), None, "x").unwrap_err().message().contains("format 9"));
        let changed = text.replace("indented", "INDENTED");
        assert!(read(changed.as_bytes(), None, "x").unwrap_err().message().contains("damaged"));
    }
}
