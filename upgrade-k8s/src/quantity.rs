//! Amounts of resources as objects write them: `500m`, `1.5Gi`, `2`.

use std::collections::BTreeMap;
use std::fmt;
use std::iter::Sum;
use std::ops::{Add, Mul, Sub};
use std::str::FromStr;

use schemars::JsonSchema;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Holds an amount exactly, in units of 10⁻⁹: the finest that the API keeps.
///
/// It is written as the API says
/// (<https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>); what is finer is rounded up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Quantity(i128);

/// Holds amounts by the name of the resource: `cpu`, `memory`, `pods`.
pub type Amounts = BTreeMap<String, Quantity>;

const NANOS: i128 = 1_000_000_000;

const BINARY: [(&str, u32); 6] = [("Ki", 10), ("Mi", 20), ("Gi", 30), ("Ti", 40), ("Pi", 50), ("Ei", 60)];
const DECIMAL: [(&str, i32); 10] =
    [("n", -9), ("u", -6), ("m", -3), ("", 0), ("k", 3), ("M", 6), ("G", 9), ("T", 12), ("P", 15), ("E", 18)];

impl Quantity {
    /// Makes an amount of whole units.
    pub fn whole(units: u64) -> Self {
        Self(i128::from(units) * NANOS)
    }

    /// Returns the amount as a figure, which may be less exact.
    pub fn as_f64(self) -> f64 {
        self.0 as f64 / NANOS as f64
    }

    /// Writes the amount as people read that of a resource: memory in the largest unit that it has whole.
    pub fn of(self, resource: &str) -> String {
        let is_bytes = resource.ends_with("memory") || resource.ends_with("storage") || resource.contains("hugepages-");
        let bytes = self.0 / NANOS;
        if !is_bytes || bytes == 0 {
            return self.to_string();
        }
        let unit = BINARY.iter().rev().find(|(_, bits)| bytes % (1 << bits) == 0);
        unit.map_or_else(|| self.to_string(), |(name, bits)| format!("{}{name}", bytes >> bits))
    }

    fn parse(text: &str) -> Option<Self> {
        let (negative, unsigned) = match text.strip_prefix('-') {
            Some(rest) => (true, rest),
            None => (false, text.strip_prefix('+').unwrap_or(text)),
        };
        let end = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
        let (number, suffix) = unsigned.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = format!("{whole}{fraction}");
        if digits.is_empty() || fraction.contains('.') {
            return None;
        }
        let digits: i128 = digits.parse().ok()?;
        let fine = i32::try_from(fraction.len()).ok()?;
        let (factor, tens) = match BINARY.iter().find(|(name, _)| *name == suffix) {
            Some((_, bits)) => (1i128 << bits, 0),
            None => (1, exponent(suffix)?),
        };
        let scaled = digits.checked_mul(factor)?;
        let tens = tens.checked_add(9)?.checked_sub(fine)?;
        let size = 10i128.checked_pow(tens.unsigned_abs());
        let nanos = match size {
            Some(size) if tens >= 0 => scaled.checked_mul(size)?,
            Some(size) => scaled / size + i128::from(scaled % size != 0),
            None if tens >= 0 && scaled != 0 => return None,
            None => i128::from(scaled != 0 && tens < 0),
        };
        Some(Self(if negative { -nanos } else { nanos }))
    }
}

fn exponent(suffix: &str) -> Option<i32> {
    if let Some((_, tens)) = DECIMAL.iter().find(|(name, _)| *name == suffix) {
        return Some(*tens);
    }
    suffix.strip_prefix(['e', 'E'])?.parse().ok()
}

impl FromStr for Quantity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::parse(text).ok_or_else(|| format!("`{text}` is no amount: write it as in 500m, 2, 1.5Gi or 200M"))
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sign, nanos) = (if self.0 < 0 { "-" } else { "" }, self.0.unsigned_abs());
        let (whole, fraction) = (nanos / NANOS.unsigned_abs(), nanos % NANOS.unsigned_abs());
        let text = format!("{sign}{whole}.{fraction:09}");
        f.write_str(text.trim_end_matches('0').trim_end_matches('.'))
    }
}

impl Add for Quantity {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Sub for Quantity {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl Mul<u64> for Quantity {
    type Output = Self;

    fn mul(self, times: u64) -> Self {
        Self(self.0.saturating_mul(i128::from(times)))
    }
}

impl Sum for Quantity {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), Add::add)
    }
}

impl Serialize for Quantity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

struct QuantityVisitor;

impl Visitor<'_> for QuantityVisitor {
    type Value = Quantity;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an amount: 500m, 2, 1.5Gi")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Quantity, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Quantity, E> {
        Ok(Quantity::whole(number))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<Quantity, E> {
        number.to_string().parse().map_err(E::custom)
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<Quantity, E> {
        number.to_string().parse().map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(QuantityVisitor)
    }
}

impl JsonSchema for Quantity {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Quantity".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": ["string", "number"],
            "description": "An amount of a resource, as Kubernetes writes it: `500m`, `2`, `1.5Gi`.",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> String {
        text.parse::<Quantity>().unwrap().to_string()
    }

    #[test]
    fn amounts_are_read_exactly() {
        for (text, exact) in [
            ("0", "0"),
            ("500m", "0.5"),
            ("1.5", "1.5"),
            (".5", "0.5"),
            ("2.", "2"),
            ("100u", "0.0001"),
            ("1n", "0.000000001"),
            ("0.1n", "0.000000001"),
            ("1k", "1000"),
            ("128974848", "128974848"),
            ("129e6", "129000000"),
            ("129M", "129000000"),
            ("123Mi", "128974848"),
            ("0.5Gi", "536870912"),
            ("1E", "1000000000000000000"),
            ("1E3", "1000"),
            ("5e-1", "0.5"),
            ("8Ei", "9223372036854775808"),
            ("-1.25", "-1.25"),
            ("0e99", "0"),
        ] {
            assert_eq!(parsed(text), exact, "{text}");
        }
    }

    #[test]
    fn what_is_no_amount_is_refused() {
        for text in ["", "-", ".", "1.2.3", "1 Gi", "Gi", "1ki", "1e", "1e99", "1e-", "0x1", "١", "1e99999999999"] {
            assert!(text.parse::<Quantity>().unwrap_err().contains("500m"), "{text}");
        }
        // Far below what is kept, and yet not nothing.
        assert_eq!(parsed("1e-99"), "0.000000001");
    }

    #[test]
    fn memory_is_written_in_the_unit_that_it_has_whole() {
        let of = |text: &str, resource| text.parse::<Quantity>().unwrap().of(resource);
        assert_eq!(of("1024Mi", "memory"), "1Gi");
        assert_eq!(of("1.5Gi", "requests.memory"), "1536Mi");
        assert_eq!(of("1000", "memory"), "1000");
        assert_eq!(of("-512Mi", "memory"), "-512Mi");
        assert_eq!(of("2048", "cpu"), "2048");
    }

    #[test]
    fn numbers_and_texts_of_a_file_are_taken() {
        let read = |json: &str| serde_json::from_str::<Quantity>(json).unwrap().to_string();
        assert_eq!([read("2"), read("0.25"), read("\"250m\"")], ["2", "0.25", "0.25"]);
    }
}
