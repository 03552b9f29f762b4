//! Statements of migrations that are dangerous under traffic: the rules of squawk, with what this
//! crate does more safely.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use squawk_linter::{Linter, Rule, Version};
use squawk_syntax::SourceFile;
use upgrade_core::registry::BuildError;

/// Says which rules count, how much, and where they do not.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LintSettings {
    /// The server's version: `15`, `16.4`. Default: that of the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// How much a rule counts, in place of its default.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub severity: BTreeMap<String, Severity>,
    /// Findings that are known and accepted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub allow: Vec<Allowance>,
}

/// Ranks a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// The rule is not asked.
    Off,
    /// Somebody should look.
    Warn,
    /// It must not run.
    Error,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Severity::Off => "off",
            Severity::Warn => "warning",
            Severity::Error => "error",
        })
    }
}

/// Accepts what a rule finds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Allowance {
    /// The rule: `ban-drop-column`.
    pub rule: String,
    /// The script, by the end of its path. Default: every script.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// Why it is accepted; shown wherever the finding would be.
    pub reason: String,
}

/// Tells of one statement that is dangerous under traffic.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The script.
    pub file: PathBuf,
    /// Its line, from one.
    pub line: usize,
    /// The rule: `require-concurrent-index-creation`.
    pub rule: String,
    /// How much it counts.
    pub severity: Severity,
    /// What is wrong with it.
    pub message: String,
    /// What to do instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
    /// Why it is accepted, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed: Option<String>,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {} {}: {}", self.file.display(), self.line, self.severity, self.rule, self.message)
    }
}

/// The rule for what the parser does not understand, which is no rule of squawk's.
const SYNTAX: &str = "syntax-error";

impl LintSettings {
    /// Asks that the settings name rules that there are, and a reason for each exception.
    ///
    /// # Errors
    /// The first mistake, with its key.
    pub fn validate(&self) -> Result<(), BuildError> {
        if let Some(version) = &self.version
            && version.parse::<Version>().is_err()
        {
            return Err(BuildError::new(format!("`{version}` is not a version of PostgreSQL"))
                .at("version")
                .with_hint("write it as `15` or `16.4`"));
        }
        let named = self.severity.keys().map(|rule| (rule, "severity".to_owned()));
        let allowed = self.allow.iter().enumerate();
        let allowed = allowed.map(|(number, allowance)| (&allowance.rule, format!("allow.{number}.rule")));
        for (rule, key) in named.chain(allowed) {
            if rule != SYNTAX && rule.parse::<Rule>().is_err() {
                return Err(BuildError::new(format!("`{rule}` is not a rule"))
                    .at(key)
                    .with_hint("the rules are those of squawk (https://squawkhq.com/docs/rules) and `syntax-error`"));
            }
        }
        match self.allow.iter().position(|allowance| allowance.reason.trim().is_empty()) {
            Some(number) => Err(BuildError::new("an exception needs a reason").at(format!("allow.{number}.reason"))),
            None => Ok(()),
        }
    }

    fn severity(&self, rule: Rule) -> Severity {
        let own = self.severity.iter().find(|(name, _)| {
            let named = name.parse::<Rule>();
            named.is_ok_and(|named| named == rule || named.expands_to().contains(&rule))
        });
        own.map_or_else(|| default_severity(rule), |(_, severity)| *severity)
    }

    /// Lists the rules that are asked: those that are on by default, and those that are named.
    fn rules(&self) -> Vec<Rule> {
        let named = self.severity.keys().filter_map(|name| name.parse::<Rule>().ok());
        let named = named.flat_map(|rule| match rule.expands_to() {
            [] => vec![rule],
            several => several.to_vec(),
        });
        let by_default = Linter::with_default_rules().rules;
        let mut rules: Vec<Rule> = by_default.into_iter().chain(named).collect();
        rules.retain(|rule| self.severity(*rule) != Severity::Off);
        rules
    }

    fn allowed(&self, file: &Path, rule: &str) -> Option<String> {
        let same = |name: &str| name == rule || name.parse::<Rule>().is_ok_and(|named| named.to_string() == rule);
        let allowance = self
            .allow
            .iter()
            .find(|allowance| same(&allowance.rule) && allowance.file.as_ref().is_none_or(|end| file.ends_with(end)))?;
        Some(allowance.reason.clone())
    }
}

/// Finds what is dangerous under traffic in scripts that are about to run, in their order.
///
/// A script runs in a transaction, unless its first line is `-- no-transaction`. A finding that is
/// accepted is listed with the reason; one behind `-- squawk-ignore` is not.
///
/// ```
/// # use upgrade_postgres::lint::{LintSettings, Severity, lint};
/// let script = ("1_index.sql".into(), "create index by_name on people (name);".to_owned());
/// let findings = lint(&[script], &LintSettings::default());
/// assert_eq!(findings[0].rule, "require-concurrent-index-creation");
/// assert_eq!(findings[0].severity, Severity::Error);
/// assert!(findings[0].help.as_ref().unwrap().contains("postgres.index"));
/// ```
pub fn lint(scripts: &[(PathBuf, String)], settings: &LintSettings) -> Vec<Finding> {
    let rules = settings.rules();
    let version = settings.version.as_ref().and_then(|version| version.parse().ok());
    scripts.iter().flat_map(|(file, text)| lint_one(file, text, settings, &rules, version)).collect()
}

fn lint_one(
    file: &Path,
    text: &str,
    settings: &LintSettings,
    rules: &[Rule],
    version: Option<Version>,
) -> Vec<Finding> {
    let parsed = SourceFile::parse(text);
    let mut linter = Linter::from(rules.iter().copied());
    linter.settings.pg_version = version.unwrap_or_default();
    linter.settings.assume_in_transaction = runs_in_transaction(text);
    let finding = |start: usize, rule: String, severity, message: String, help| Finding {
        file: file.to_owned(),
        line: line_of(text, start),
        allowed: settings.allowed(file, &rule),
        rule,
        severity,
        message,
        help,
    };
    let mut findings = Vec::new();
    let severity = settings.severity.get(SYNTAX).copied().unwrap_or(Severity::Warn);
    if severity != Severity::Off {
        findings.extend(parsed.errors().iter().map(|error| {
            let help = "what the parser does not understand is not judged: the server may well understand it";
            let start = error.range().start().into();
            finding(start, SYNTAX.to_owned(), severity, error.message().to_owned(), Some(help.to_owned()))
        }));
    }
    let mut violations = linter.lint(&parsed, text);
    let alone = Rule::BanConcurrentIndexCreationInTransaction;
    if rules.contains(&alone) && parsed.tree().stmts().count() == 1 {
        // The rule passes a statement that stands alone, which other tools run outside of a transaction.
        let text = format!("{text}\n; select 1;");
        let mut linter = Linter::from([alone]);
        linter.settings.assume_in_transaction = runs_in_transaction(&text);
        violations.extend(linter.lint(&SourceFile::parse(&text), &text));
    }
    findings.extend(violations.into_iter().map(|violation| {
        let help = [violation.help.as_deref(), instead(violation.code)];
        let help = help.into_iter().flatten().map(|text| text.trim_end_matches('.')).collect::<Vec<_>>().join("; ");
        finding(
            violation.text_range.start().into(),
            violation.code.to_string(),
            settings.severity(violation.code),
            violation.message,
            (!help.is_empty()).then_some(help),
        )
    }));
    findings.sort_by_key(|finding| finding.line);
    findings
}

/// Names the line of a statement that would begin or end the transaction in which the script runs.
pub(crate) fn leaves_transaction(text: &str) -> Option<usize> {
    let mut linter = Linter::from([Rule::TransactionNesting]);
    linter.settings.assume_in_transaction = true;
    let violations = linter.lint(&SourceFile::parse(text), text);
    let leaving = violations.iter().find(|violation| {
        let range = usize::from(violation.text_range.start())..usize::from(violation.text_range.end());
        // `ROLLBACK TO` a savepoint stays within.
        let mut words = text.get(range).unwrap_or_default().split_whitespace();
        !words.any(|word| word.eq_ignore_ascii_case("to"))
    })?;
    Some(line_of(text, leaving.text_range.start().into()))
}

/// Tells whether a script runs in a transaction: not if its first line says so.
fn runs_in_transaction(text: &str) -> bool {
    let first = text.trim_start_matches('\u{feff}').lines().next().unwrap_or_default();
    !first.trim().strip_prefix("--").is_some_and(|comment| comment.trim().starts_with("no-transaction"))
}

/// Counts the line of a place, past the blanks that it begins with.
fn line_of(text: &str, start: usize) -> usize {
    let rest = text.get(start..).unwrap_or_default();
    let start = start + (rest.len() - rest.trim_start().len());
    text.get(..start).unwrap_or(text).matches('\n').count() + 1
}

/// Ranks a rule: an error is what holds up traffic, breaks the code that runs or loses data.
fn default_severity(rule: Rule) -> Severity {
    use Rule::{
        AddingFieldWithDefault, AddingForeignKeyConstraint, AddingNotNullableField, AddingRequiredField,
        AddingSerialPrimaryKeyField, BanAlterDomainWithAddConstraint, BanConcurrentIndexCreationInTransaction,
        BanDropColumn, BanDropDatabase, BanDropTable, BanTruncateCascade, BanUncommittedTransaction,
        ChangingColumnType, ConstraintMissingNotValid, DisallowedUniqueConstraint, PreferRepack, PreferRobustStmts,
        RenamingColumn, RenamingTable, RequireConcurrentIndexCreation, RequireConcurrentIndexDeletion,
        RequireConcurrentPartitionDetach, RequireConcurrentReindex, RequireLockTimeout, RequireStatementTimeout,
        TransactionNesting,
    };
    match rule {
        // Scripts run under the lock policy of the target, and exactly once.
        RequireLockTimeout | RequireStatementTimeout | PreferRobustStmts => Severity::Off,
        rule if rule.is_opt_in() => Severity::Off,
        AddingFieldWithDefault
        | AddingForeignKeyConstraint
        | AddingNotNullableField
        | AddingRequiredField
        | AddingSerialPrimaryKeyField
        | BanAlterDomainWithAddConstraint
        | BanConcurrentIndexCreationInTransaction
        | BanDropColumn
        | BanDropDatabase
        | BanDropTable
        | BanTruncateCascade
        | BanUncommittedTransaction
        | ChangingColumnType
        | ConstraintMissingNotValid
        | DisallowedUniqueConstraint
        | PreferRepack
        | RenamingColumn
        | RenamingTable
        | RequireConcurrentIndexCreation
        | RequireConcurrentIndexDeletion
        | RequireConcurrentPartitionDetach
        | RequireConcurrentReindex
        | TransactionNesting => Severity::Error,
        _ => Severity::Warn,
    }
}

/// Names what this crate does more safely, or how else it is done.
fn instead(rule: Rule) -> Option<&'static str> {
    Some(match rule {
        Rule::RequireConcurrentIndexCreation
        | Rule::RequireConcurrentIndexDeletion
        | Rule::BanConcurrentIndexCreationInTransaction => {
            "a `postgres.index` step does it concurrently, outside of a transaction, and clears what a failure leaves"
        }
        Rule::DisallowedUniqueConstraint | Rule::AddingSerialPrimaryKeyField => {
            "let a `postgres.index` step build the unique index, and add the constraint with USING INDEX"
        }
        Rule::AddingForeignKeyConstraint => {
            "a `postgres.foreign_key` step adds it NOT VALID and validates it while writes go on"
        }
        Rule::ConstraintMissingNotValid => {
            "add it NOT VALID here and validate it in a script of its own; a `postgres.foreign_key` step does both"
        }
        Rule::ChangingColumnType
        | Rule::RenamingColumn
        | Rule::AddingNotNullableField
        | Rule::AddingRequiredField
        | Rule::AddingFieldWithDefault => {
            "a `postgres.expand` step keeps the old shape working until commit, and reads the table without holding it up"
        }
        Rule::BanDropColumn => "the contraction of a `postgres.expand` step drops the old column at commit",
        Rule::RenamingTable => "keep a view of the old name until the code that uses it is gone",
        Rule::TransactionNesting => "each script runs in a transaction of its own: leave BEGIN and COMMIT out",
        Rule::BanDropTable => "drop it in a later release, when nothing has used it for a while and a backup is proven",
        _ => return None,
    })
}
