//! How things look: plans, stories, tables, endings.

pub(crate) mod ending;
pub(crate) mod event;
pub(crate) mod narrator;
pub(crate) mod palette;
pub(crate) mod plan;
pub(crate) mod status;

use std::fmt;

use semver::Version;
use upgrade_core::entry::Header;
use upgrade_core::journal::RunSummary;
use upgrade_core::pipeline::Pipeline;
use upgrade_core::units::Span;

/// Writes a duration as people read it: `12 ms`, `1.2 s`, `3m12s`.
pub(crate) fn elapsed(milliseconds: u64) -> String {
    match milliseconds {
        0..1_000 => format!("{milliseconds} ms"),
        1_000..60_000 => format!("{:.1} s", milliseconds as f64 / 1000.0),
        _ => Span::from_secs(milliseconds / 1000).to_string(),
    }
}

/// Names an upgrade: `notes 1.0.0 → 1.1.0 (staging)`.
#[derive(Debug, Clone)]
pub(crate) struct Title {
    pub(crate) name: String,
    pub(crate) from: Option<Version>,
    pub(crate) to: Option<Version>,
    pub(crate) environment: Option<String>,
}

impl fmt::Display for Title {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        match (&self.from, &self.to) {
            (Some(from), Some(to)) => write!(f, " {from} → {to}")?,
            (None, Some(to)) => write!(f, " → {to}")?,
            (Some(from), None) => write!(f, " {from}")?,
            (None, None) => {}
        }
        match &self.environment {
            Some(environment) => write!(f, " ({environment})"),
            None => Ok(()),
        }
    }
}

impl From<&Header> for Title {
    fn from(header: &Header) -> Self {
        Self {
            name: header.pipeline.to_string(),
            from: header.from.clone(),
            to: header.to.clone(),
            environment: header.environment.clone(),
        }
    }
}

impl From<&RunSummary> for Title {
    fn from(run: &RunSummary) -> Self {
        Self {
            name: run.pipeline.as_ref().map_or_else(|| "a damaged run".to_owned(), ToString::to_string),
            from: run.from.clone(),
            to: run.to.clone(),
            environment: run.environment.clone(),
        }
    }
}

impl From<&Pipeline> for Title {
    fn from(pipeline: &Pipeline) -> Self {
        Self {
            name: pipeline.name().to_string(),
            from: None,
            to: pipeline.to().cloned(),
            environment: pipeline.environment().map(str::to_owned),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_short() {
        assert_eq!(elapsed(12), "12 ms");
        assert_eq!(elapsed(1_240), "1.2 s");
        assert_eq!(elapsed(192_000), "3m12s");
    }

    #[test]
    fn a_title_shows_what_is_known() {
        let mut title = Title { name: "notes".into(), from: None, to: None, environment: None };
        assert_eq!(title.to_string(), "notes");
        title.to = Some("1.1.0".parse().unwrap());
        assert_eq!(title.to_string(), "notes → 1.1.0");
        title.from = Some("1.0.0".parse().unwrap());
        title.environment = Some("staging".into());
        assert_eq!(title.to_string(), "notes 1.0.0 → 1.1.0 (staging)");
    }
}
