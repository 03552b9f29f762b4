//! What a script holds, as far as it decides how it is run and what it discards.
//!
//! The server judges a script's syntax, not we: where ours does not know a statement, nothing is
//! refused for it.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256, Sha384};
use squawk_syntax::ast::{AlterTableAction, AstNode, Stmt};
use squawk_syntax::{SourceFile, SyntaxKind, SyntaxNode};
use upgrade_core::error::StepError;

/// What a script begins with that runs outside of a transaction; sqlx's rule.
const OUTSIDE: &str = "-- no-transaction";

/// Holds a script and where it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script {
    /// The file, as messages name it.
    pub file: String,
    /// The text.
    pub text: String,
    /// Whether it runs outside of a transaction, statement by statement.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub outside_transaction: bool,
}

/// Holds one statement of a script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statement {
    /// The statement, without its semicolon.
    pub text: String,
    /// Its line in the file, from one.
    pub line: usize,
    /// What is known of it, where it must be known.
    pub kind: StatementKind,
}

/// Sorts statements by how one is taken up again that a crash cut off.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StatementKind {
    /// Runs in a transaction, with the row that says so.
    Transactional,
    /// `CREATE INDEX CONCURRENTLY`: leaves an INVALID index where it fails.
    CreateIndex {
        /// The index, as the script spells it; without one the server names it.
        index: Option<String>,
        /// The table, as the script spells it.
        table: String,
    },
    /// `DROP INDEX CONCURRENTLY`.
    DropIndex {
        /// The index, as the script spells it.
        index: String,
    },
    /// `REINDEX … CONCURRENTLY`: leaves INVALID indexes named `…_ccnew` where it fails.
    Reindex,
    /// `ALTER TABLE … DETACH PARTITION … CONCURRENTLY`.
    Detach {
        /// The table, as the script spells it.
        table: String,
        /// The partition, as the script spells it.
        partition: String,
    },
    /// Anything else that no transaction takes, and that can be done again: `VACUUM`.
    Other,
}

impl Script {
    /// Takes a script.
    pub fn new(file: impl Into<String>, text: String) -> Self {
        let outside_transaction = text.starts_with(OUTSIDE);
        Self { file: file.into(), text, outside_transaction }
    }

    /// Digests it as sqlx does: SHA-384 of the text.
    pub fn sha384(&self) -> String {
        hex(&Sha384::digest(&self.text))
    }

    /// Digests it with SHA-256.
    pub fn sha256(&self) -> String {
        hex(&Sha256::digest(&self.text))
    }

    /// Digests it as Flyway does: CRC-32 of the lines without their ends, as a signed number.
    pub fn flyway_checksum(&self) -> i32 {
        let text = self.text.strip_prefix('\u{feff}').unwrap_or(&self.text);
        let mut crc = crc32fast::Hasher::new();
        // A line ends with \n, \r or \r\n.
        text.replace("\r\n", "\n").split(['\n', '\r']).for_each(|line| crc.update(line.as_bytes()));
        crc.finalize().cast_signed()
    }

    /// Refuses what would break the promise that the script and its row are one transaction.
    ///
    /// # Errors
    /// It begins or ends a transaction itself, or reads data from a client.
    pub fn check(&self) -> Result<(), StepError> {
        for statement in statements_of(&parse(&self.text)) {
            let refused = match &statement {
                Stmt::Begin(_) | Stmt::Commit(_) | Stmt::PrepareTransaction(_) => true,
                Stmt::Rollback(rollback) => !has(rollback.syntax(), SyntaxKind::TO_KW),
                _ => false,
            };
            let line = self.line_of(statement.syntax());
            let words = first_words(statement.syntax());
            if refused {
                return Err(StepError::permanent(format!(
                    "{}, line {line}: `{words}` would tear the script from the row that says it was applied",
                    self.file
                ))
                .with_hint(
                    "take it out: the script runs in a transaction of its own; what cannot, goes into a migration that begins with `-- no-transaction`",
                ));
            }
            if let Stmt::Copy(copy) = &statement
                && has(copy.syntax(), SyntaxKind::STDIN_KW)
            {
                return Err(StepError::permanent(format!(
                    "{}, line {line}: `COPY … FROM STDIN` reads from a client, and a script has none",
                    self.file
                ))
                .with_hint("write the rows as INSERT (`pg_dump --inserts` does)"));
            }
        }
        Ok(())
    }

    /// Tells whether it changes settings of the session, which the next script must not find.
    pub fn changes_session(&self) -> bool {
        let lower = self.text.to_ascii_lowercase();
        lower.contains("set_config")
            || (["set", "reset", "temp", "listen", "prepare", "discard", "declare", "load"]
                .iter()
                .any(|word| lower.contains(word))
                && statements_of(&parse(&self.text)).any(|statement| {
                    matches!(
                        statement,
                        Stmt::Set(_)
                            | Stmt::SetRole(_)
                            | Stmt::SetSessionAuth(_)
                            | Stmt::Reset(_)
                            | Stmt::ResetRole(_)
                            | Stmt::ResetSessionAuth(_)
                            | Stmt::Listen(_)
                            | Stmt::Prepare(_)
                            | Stmt::Discard(_)
                            | Stmt::Declare(_)
                            | Stmt::Load(_)
                    ) || matches!(&statement, Stmt::CreateTable(table) if has(table.syntax(), SyntaxKind::TEMP_KW)
                        || has(table.syntax(), SyntaxKind::TEMPORARY_KW))
                }))
    }

    /// Lists what data the script discards, each in a few words.
    pub fn discards(&self) -> Vec<String> {
        let lower = self.text.to_ascii_lowercase();
        if !["drop", "delete", "truncate", "update"].iter().any(|word| lower.contains(word)) {
            return Vec::new();
        }
        let mut found = Vec::new();
        for statement in statements_of(&parse(&self.text)) {
            discarded_by(&statement, &mut found);
        }
        found
    }

    /// Takes the script apart.
    ///
    /// # Errors
    /// It is not understood, so that nobody can tell where one statement ends.
    pub fn statements(&self) -> Result<Vec<Statement>, StepError> {
        let parsed = SourceFile::parse(&self.text);
        if let Some(error) = parsed.errors().first() {
            let line = line_at(&self.text, error.range().start().into());
            return Err(StepError::permanent(format!(
                "{}, line {line}: the script cannot be taken apart: {}",
                self.file,
                error.message()
            ))
            .with_hint("correct it; outside of a transaction, statements are run one by one"));
        }
        let root = parsed.syntax_node();
        Ok(statements_of(&root)
            .filter(|statement| !matches!(statement, Stmt::EmptyStmt(_)))
            .map(|statement| Statement {
                text: text_of(statement.syntax()),
                line: self.line_of(statement.syntax()),
                kind: kind_of(&statement),
            })
            .collect())
    }

    fn line_of(&self, node: &SyntaxNode) -> usize {
        line_at(&self.text, start(node))
    }
}

/// Writes bytes in hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn parse(text: &str) -> SyntaxNode {
    SourceFile::parse(text).syntax_node()
}

fn statements_of(root: &SyntaxNode) -> impl Iterator<Item = Stmt> {
    root.children().filter_map(Stmt::cast)
}

/// Returns where a node begins, comments before it left out.
fn start(node: &SyntaxNode) -> usize {
    node.descendants_with_tokens()
        .filter_map(|element| element.into_token())
        .find(|token| !matches!(token.kind(), SyntaxKind::WHITESPACE | SyntaxKind::COMMENT))
        .map_or(node.text_range().start(), |token| token.text_range().start())
        .into()
}

fn line_at(text: &str, at: usize) -> usize {
    text.as_bytes()[..at.min(text.len())].iter().filter(|byte| **byte == b'\n').count() + 1
}

fn has(node: &SyntaxNode, kind: SyntaxKind) -> bool {
    node.descendants_with_tokens().any(|element| element.kind() == kind)
}

fn first_words(node: &SyntaxNode) -> String {
    text_of(node).split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// Returns a statement without comments before it and without its semicolon.
fn text_of(node: &SyntaxNode) -> String {
    let text = node.text().to_string();
    let at = start(node).saturating_sub(node.text_range().start().into());
    text.get(at..).unwrap_or_default().trim().trim_end_matches(';').to_owned()
}

fn spelled(node: &SyntaxNode) -> String {
    node.text().to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn kind_of(statement: &Stmt) -> StatementKind {
    let concurrently = has(statement.syntax(), SyntaxKind::CONCURRENTLY_KW);
    match statement {
        Stmt::CreateIndex(create) if concurrently => StatementKind::CreateIndex {
            index: create.index().map(|index| spelled(index.syntax())),
            table: create
                .table_relation_name()
                .and_then(|name| name.table_name_ref())
                .map(|name| spelled(name.syntax()))
                .unwrap_or_default(),
        },
        Stmt::DropIndex(drop) if concurrently => StatementKind::DropIndex {
            index: drop.index_refs().map(|index| spelled(index.syntax())).next().unwrap_or_default(),
        },
        Stmt::Reindex(_) if concurrently => StatementKind::Reindex,
        Stmt::AlterTable(alter) if concurrently => {
            let partition = alter.actions().find_map(|action| match action {
                AlterTableAction::DetachPartition(detach) => detach.table_name_ref(),
                _ => None,
            });
            let table = alter.table_relation_name().and_then(|name| name.table_name_ref());
            match (table, partition) {
                (Some(table), Some(partition)) => {
                    StatementKind::Detach { table: spelled(table.syntax()), partition: spelled(partition.syntax()) }
                }
                _ => StatementKind::Transactional,
            }
        }
        Stmt::Vacuum(_)
        | Stmt::Call(_)
        | Stmt::Do(_)
        | Stmt::Cluster(_)
        | Stmt::CreateDatabase(_)
        | Stmt::DropDatabase(_)
        | Stmt::CreateTablespace(_)
        | Stmt::DropTablespace(_)
        | Stmt::AlterSystem(_)
        | Stmt::Reindex(_)
        | Stmt::CreateSubscription(_)
        | Stmt::DropSubscription(_)
        | Stmt::AlterSubscription(_) => StatementKind::Other,
        _ => StatementKind::Transactional,
    }
}

fn discarded_by(statement: &Stmt, found: &mut Vec<String>) {
    let each = |found: &mut Vec<String>, what: &str, names: Vec<String>| {
        found.extend(names.into_iter().map(|name| format!("{what} {name}")));
    };
    match statement {
        Stmt::DropTable(drop) => {
            each(found, "table", drop.table_name_refs().map(|name| spelled(name.syntax())).collect());
        }
        Stmt::DropSchema(drop) => {
            each(found, "schema", drop.schema_refs().map(|name| spelled(name.syntax())).collect());
        }
        Stmt::DropSequence(drop) => {
            each(found, "sequence", drop.sequence_refs().map(|name| spelled(name.syntax())).collect());
        }
        Stmt::DropType(drop) if has(drop.syntax(), SyntaxKind::CASCADE_KW) => {
            each(found, "columns of type", drop.type_name_refs().map(|name| spelled(name.syntax())).collect());
        }
        Stmt::DropExtension(drop) if has(drop.syntax(), SyntaxKind::CASCADE_KW) => {
            each(found, "all of extension", drop.extension_refs().map(|name| spelled(name.syntax())).collect());
        }
        Stmt::DropOwned(_) => found.push("all that a role owns".to_owned()),
        Stmt::Truncate(truncate) => {
            let tables = truncate.table_list().map(|tables| spelled(tables.syntax())).unwrap_or_default();
            found.push(format!("all rows of {tables}"));
        }
        Stmt::Delete(delete) => {
            let table = delete.relation_name().map(|name| spelled(name.syntax())).unwrap_or_default();
            let which = if delete.where_clause_or_current_of().is_some() { "some" } else { "all" };
            found.push(format!("{which} rows of {table}"));
        }
        Stmt::Update(update) => {
            let table = update.relation_name().map(|name| spelled(name.syntax())).unwrap_or_default();
            let columns = update.set_clause().map(|set| spelled(set.syntax())).unwrap_or_default();
            let columns: String = columns.chars().take(60).collect();
            found.push(format!("values in {table} ({columns})"));
        }
        Stmt::AlterTable(alter) => {
            let table =
                alter.table_relation_name().map(|name| spelled(name.syntax())).unwrap_or_else(|| "a table".into());
            for action in alter.actions() {
                if let AlterTableAction::DropColumn(drop) = action {
                    let column = drop.column_name_ref().map(|name| spelled(name.syntax())).unwrap_or_default();
                    found.push(format!("column {table}.{column}"));
                }
            }
        }
        _ => {}
    }
}

/// Tells whether a script takes another role, under which our rows cannot be written.
pub(crate) fn takes_a_role(script: &Script) -> bool {
    let lower = script.text.to_ascii_lowercase();
    (lower.contains("role") || lower.contains("session"))
        && statements_of(&parse(&script.text)).any(|statement| {
            matches!(statement, Stmt::SetRole(_) | Stmt::SetSessionAuth(_))
                || matches!(&statement, Stmt::Set(set) if has(set.syntax(), SyntaxKind::ROLE_KW))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> Script {
        Script::new("1_a.up.sql", text.to_owned())
    }

    #[test]
    fn control_of_transactions_is_found_with_its_line() {
        for (text, line) in [
            ("begin; create table a (); commit;", 1),
            ("create table a ();\n-- so\nCOMMIT;", 3),
            ("select 1;\nstart transaction;", 2),
            ("select 1;\n\nrollback;", 3),
            ("select 1; end;", 1),
            ("select 1; abort;", 1),
        ] {
            let error = script(text).check().unwrap_err();
            assert!(error.message().starts_with(&format!("1_a.up.sql, line {line}: `")), "{text}: {error}");
        }
        for text in [
            "create function f() returns void language plpgsql as $$ begin perform 1; end $$;",
            "create function f() returns int language sql begin atomic select 1; end;",
            "do $$ begin raise notice 'commit;'; end $$;",
            "savepoint a; rollback to savepoint a; release a;",
            "insert into a values ('begin; commit;'); -- commit;",
            "create rule r as on insert to a do also (delete from b; delete from c);",
        ] {
            script(text).check().unwrap_or_else(|error| panic!("{text}: {error}"));
        }
        let copy = script("create table a (x int);\ncopy a from stdin;\n").check().unwrap_err();
        assert!(copy.message().contains("line 2"), "{copy}");
    }

    #[test]
    fn what_a_script_discards_is_listed() {
        let text = "drop table a, b cascade; alter table c drop column d, drop column if exists e; \
                    delete from f where x = 1; delete from g; truncate h; drop view i; drop index j; \
                    create function drop_table() returns void language sql as 'delete from k'; update l set m = 1;";
        assert_eq!(
            script(text).discards(),
            [
                "table a",
                "table b",
                "column c.d",
                "column c.e",
                "some rows of f",
                "all rows of g",
                "all rows of h",
                "values in l (set m = 1)"
            ]
        );
    }

    #[test]
    fn a_script_is_taken_apart() {
        let text = "-- no-transaction\ncreate index concurrently if not exists i on s.t (a);\n\n-- then\nvacuum t;\n\
                    drop index concurrently j; select ';'; reindex index concurrently k; \
                    create index concurrently on t (b); alter table p detach partition q concurrently";
        let script = script(text);
        assert!(script.outside_transaction);
        let found: Vec<_> =
            script.statements().unwrap().into_iter().map(|statement| (statement.line, statement.kind)).collect();
        assert_eq!(
            found,
            [
                (2, StatementKind::CreateIndex { index: Some("i".into()), table: "s.t".into() }),
                (5, StatementKind::Other),
                (6, StatementKind::DropIndex { index: "j".into() }),
                (6, StatementKind::Transactional),
                (6, StatementKind::Reindex),
                (6, StatementKind::CreateIndex { index: None, table: "t".into() }),
                (6, StatementKind::Detach { table: "p".into(), partition: "q".into() }),
            ]
        );
        assert!(script.statements().unwrap().iter().all(|statement| !statement.text.ends_with(';')));
    }

    #[test]
    fn settings_of_the_session_are_noticed() {
        for text in
            ["set search_path = a;", "select pg_catalog.set_config('search_path', '', false)", "create temp table a ()"]
        {
            assert!(script(text).changes_session(), "{text}");
        }
        for text in ["create table a ();", "update a set b = 1", "create table reset (load int)"] {
            assert!(!script(text).changes_session(), "{text}");
        }
        assert!(takes_a_role(&script("set local role app; create table a ();")));
        assert!(!takes_a_role(&script("create table role ();")));
    }

    #[test]
    fn checksums_are_those_of_the_tools() {
        let one = script("\u{feff}create table a (id int);\r\n");
        let two = script("create table a (id int);");
        assert_eq!(one.flyway_checksum(), two.flyway_checksum());
        assert_eq!(script("").flyway_checksum(), 0);
        // CRC-32 of the two lines, one after the other, as a signed number.
        assert_eq!(script("create table a (id int);\ninsert into a values (1);\n").flyway_checksum(), -94847981);
        assert_eq!(script("").sha384().len(), 96);
    }
}
