//! Quantities as people write them: `10m`, `200MiB`, `20%`.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Says why a text is not a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not {what}: write it as {example}")]
pub struct UnitError {
    text: String,
    what: &'static str,
    example: &'static str,
}

fn split_number(text: &str) -> Option<(f64, &str)> {
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let number: f64 = text[..end].parse().ok()?;
    // Digits enough make an infinity, which is no quantity and could not be read again.
    number.is_finite().then(|| (number, text[end..].trim_start()))
}

/// Holds a length of time, written `250ms`, `5s`, `10m`, `2h`, `1d` or joined: `1h30m`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Span(pub Duration);

impl Span {
    /// Makes a span of whole seconds.
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// Makes a span of milliseconds.
    pub const fn from_millis(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }
}

impl From<Duration> for Span {
    fn from(duration: Duration) -> Self {
        Self(duration)
    }
}

impl FromStr for Span {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || UnitError {
            text: text.to_owned(),
            what: "a length of time",
            example: "250ms, 5s, 10m, 2h, 1d or 1h30m",
        };
        let mut rest = text.trim();
        let mut seconds = 0.0;
        if rest.is_empty() {
            return Err(wrong());
        }
        while !rest.is_empty() {
            let (number, after) = split_number(rest).ok_or_else(wrong)?;
            let end = after.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(after.len());
            let factor = match &after[..end] {
                "ms" => 0.001,
                "s" => 1.0,
                "m" => 60.0,
                "h" => 3_600.0,
                "d" => 86_400.0,
                _ => return Err(wrong()),
            };
            seconds += number * factor;
            rest = after[end..].trim_start();
        }
        // A century: past it, adding the span to a clock may overflow.
        if seconds > 3_155_760_000.0 {
            return Err(wrong());
        }
        Ok(Self(Duration::from_millis((seconds * 1000.0).round() as u64)))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = self.0.as_millis();
        let text = if ms == 0 {
            "0s".to_owned()
        } else if !ms.is_multiple_of(1000) && ms < 10_000 {
            format!("{ms}ms")
        } else {
            let mut seconds = (ms + 500) / 1000;
            let mut text = String::new();
            for (name, size) in [("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1)] {
                if seconds >= size {
                    text += &format!("{}{name}", seconds / size);
                    seconds %= size;
                }
            }
            text
        };
        f.pad(&text)
    }
}

/// Holds a number of bytes, written `512`, `64KiB`, `200MiB`, `2GiB`, `1TiB` or `10MB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || UnitError {
            text: text.to_owned(),
            what: "a number of bytes",
            example: "512, 64KiB, 200MiB, 2GiB or 10MB",
        };
        let (number, unit) = split_number(text.trim()).ok_or_else(wrong)?;
        let factor: u64 = match unit.trim() {
            "" | "B" => 1,
            "kB" | "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            "KiB" | "K" => 1 << 10,
            "MiB" | "M" => 1 << 20,
            "GiB" | "G" => 1 << 30,
            "TiB" | "T" => 1 << 40,
            _ => return Err(wrong()),
        };
        let bytes = number * factor as f64;
        if bytes >= 9.0e18 {
            return Err(wrong());
        }
        Ok(Self(bytes as u64))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self.0 {
            b if b >= 1 << 40 => format!("{:.1} TiB", b as f64 / (1u64 << 40) as f64),
            b if b >= 1 << 30 => format!("{:.1} GiB", b as f64 / (1u64 << 30) as f64),
            b if b >= 1 << 20 => format!("{:.1} MiB", b as f64 / (1u64 << 20) as f64),
            b if b >= 1 << 10 => format!("{:.1} KiB", b as f64 / (1u64 << 10) as f64),
            b => format!("{b} B"),
        };
        f.pad(&text)
    }
}

/// Holds a share of something, written `20%` or `0.2`.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default)]
pub struct Share(pub f64);

impl FromStr for Share {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || UnitError { text: text.to_owned(), what: "a share", example: "20% or 0.2" };
        match split_number(text.trim()).ok_or_else(wrong)? {
            (number, "%") => Ok(Self(number / 100.0)),
            (number, "") => Ok(Self(number)),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}%", (self.0 * 1e6).round() / 1e4))
    }
}

/// Accepts a quantity as a text or as a bare number.
struct Quantity<T>(std::marker::PhantomData<T>, &'static str);

impl<T: FromStr<Err = UnitError>> de::Visitor<'_> for Quantity<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.1)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }
}

macro_rules! quantity {
    ($type:ident, $expecting:literal, $pattern:literal, [$($schema:literal),+]) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.exact())
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_any(Quantity::<$type>(std::marker::PhantomData, $expecting))
            }
        }

        #[cfg(feature = "file")]
        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($type).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!({
                    "type": [$($schema),+],
                    "pattern": $pattern,
                    "description": concat!("Written as ", $expecting, "."),
                })
            }
        }
    };
}

quantity!(
    Span,
    "a length of time such as 250ms, 5s, 10m, 2h or 1h30m",
    r"^\s*([0-9.]+\s*(ms|s|m|h|d)\s*)+$|^.*\$\{.*$",
    ["string"]
);
quantity!(
    Bytes,
    "a number of bytes such as 512, 64KiB or 200MiB",
    r"^\s*[0-9.]+\s*(B|[kKMGT]B|[KMGT]iB|[KMGT])?\s*$|^.*\$\{.*$",
    ["string", "integer"]
);
quantity!(Share, "a share such as 20% or 0.2", r"^\s*[0-9.]+\s*%?\s*$|^.*\$\{.*$", ["string", "number"]);

impl Span {
    fn exact(&self) -> String {
        match self.0.as_millis() {
            ms if ms.is_multiple_of(1000) => format!("{}s", ms / 1000),
            ms => format!("{ms}ms"),
        }
    }
}

impl Bytes {
    fn exact(&self) -> String {
        self.0.to_string()
    }
}

impl Share {
    fn exact(&self) -> String {
        self.0.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_read_and_print_alike() {
        for (text, ms, shown) in [
            ("250ms", 250, "250ms"),
            ("5s", 5_000, "5s"),
            ("1h30m", 5_400_000, "1h30m"),
            ("1.5s", 1_500, "1500ms"),
            ("2d", 172_800_000, "2d"),
        ] {
            let span: Span = text.parse().unwrap();
            assert_eq!(span.0.as_millis(), ms, "{text}");
            assert_eq!(span.to_string(), shown);
            assert_eq!(serde_json::from_value::<Span>(serde_json::to_value(span).unwrap()).unwrap(), span);
        }
        for wrong in ["", "5", "s", "5 parsecs", "-1s", "1e9d", "99999999d"] {
            assert!(wrong.parse::<Span>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn bytes_and_shares_take_bare_numbers() {
        assert_eq!(serde_json::from_str::<Bytes>("512").unwrap(), Bytes(512));
        assert_eq!("200MiB".parse::<Bytes>().unwrap(), Bytes(200 << 20));
        assert_eq!(serde_json::from_str::<Share>("\"20%\"").unwrap(), Share(0.2));
        assert_eq!(serde_json::from_str::<Share>("0.2").unwrap(), Share(0.2));
        assert!("20 apples".parse::<Share>().is_err());
        assert!("9".repeat(400).parse::<Share>().is_err(), "an infinity is no share");
    }
}
