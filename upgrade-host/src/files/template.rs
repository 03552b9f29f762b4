//! Contents made from a template, with secrets resolved at use.

use std::collections::BTreeMap;
use std::path::PathBuf;

use minijinja::syntax::SyntaxConfig;
use minijinja::{AutoEscape, Environment, UndefinedBehavior};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use upgrade_core::context::Context;
use upgrade_core::error::StepError;
use upgrade_core::registry::BuildError;
use upgrade_core::secret::{ExposeSecret, SecretRef};

use crate::error::io_error;
use crate::files::masked_diff::{MASK, Shown};

/// Makes a text from a template in the language of Jinja; a name that is not defined is an error.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Template {
    /// The template, as it stands here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The file that holds the template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// What the template may name: `{{ port }}`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub vars: Map<String, Value>,
    /// Secrets that the template may name: `{{ secrets.password }}`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<String, SecretRef>,
}

impl Template {
    pub(crate) fn validate(&self) -> Result<(), BuildError> {
        if self.text.is_some() == self.file.is_some() {
            return Err(BuildError::new("a template has either `text` or `file`").at("template"));
        }
        if self.vars.contains_key("secrets") {
            return Err(BuildError::new("`secrets` names the secrets and cannot be a variable")
                .at("template.vars.secrets")
                .with_hint("give the variable another name, or move secrets to `template.secrets`"));
        }
        Ok(())
    }
}

/// Renders a template; returns the content and what of it may be shown.
pub(crate) async fn render(cx: &Context, template: &Template) -> Result<(Vec<u8>, Shown), StepError> {
    let (name, text) = match (&template.text, &template.file) {
        (Some(text), _) => ("the template".to_owned(), text.clone()),
        (None, Some(file)) => {
            let text = tokio::fs::read_to_string(file)
                .await
                .map_err(|error| io_error(format!("the template {} cannot be read", file.display()), &error))?;
            (file.display().to_string(), text)
        }
        (None, None) => return Err(StepError::permanent("the template has no text").with_hint("give `template.text`")),
    };
    let mut secrets = Map::new();
    let mut masked = Map::new();
    for (key, reference) in &template.secrets {
        let secret = cx.secret(reference).await?;
        secrets.insert(key.clone(), Value::String(secret.expose_secret().to_owned()));
        masked.insert(key.clone(), Value::String(MASK.to_owned()));
    }
    let with_secrets = render_with(&name, &text, &template.vars, secrets)?;
    // What is shown never held a secret, so that no filter can carry one past the mask. Where
    // the template cannot be rendered so, nothing of it is shown.
    let shown = render_with(&name, &text, &template.vars, masked).map_or(Shown::Masked(String::new()), Shown::Clear);
    Ok((with_secrets.into_bytes(), shown))
}

fn render_with(
    name: &str,
    text: &str,
    vars: &Map<String, Value>,
    secrets: Map<String, Value>,
) -> Result<String, StepError> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    let syntax = SyntaxConfig::builder()
        .keep_trailing_newline(true)
        .build()
        .map_err(|error| StepError::permanent("the template language cannot be set up").with_cause(&error))?;
    environment.set_syntax(syntax);
    environment.set_debug(false);
    let mut names = vars.clone();
    names.insert("secrets".to_owned(), Value::Object(secrets));
    environment.render_named_str("template", text, named(&Value::Object(names))).map_err(|error| {
        // The error's own text may quote a value; kind and line are enough to find the place.
        let line = error.line().map(|line| format!(", line {line}")).unwrap_or_default();
        StepError::permanent(format!("{name}{line}: {}", error.kind()))
            .with_hint("every name must be under `vars` or `secrets`, or have a default: {{ port | default(8080) }}")
    })
}

fn named(value: &Value) -> minijinja::Value {
    match value {
        Value::Null => minijinja::Value::from(()),
        Value::Bool(value) => (*value).into(),
        Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => number.into(),
            (None, Some(number)) => number.into(),
            (None, None) => number.as_f64().unwrap_or(f64::NAN).into(),
        },
        Value::String(text) => text.as_str().into(),
        Value::Array(items) => items.iter().map(named).collect::<Vec<_>>().into(),
        Value::Object(map) => {
            map.iter().map(|(key, value)| (key.clone(), named(value))).collect::<BTreeMap<_, _>>().into()
        }
    }
}
