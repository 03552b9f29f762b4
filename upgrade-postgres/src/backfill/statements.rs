//! The SQL of a backfill, as text: nothing here talks to a server.
//!
//! Expressions of the pipeline name columns plainly, so the table keeps its own name, and what is
//! joined to it has names that no table has.

use sqlx::AssertSqlSafe;

use super::plan::{Column, Found, Plan};
use crate::identifier::{Identifier, TableName};

/// The name of the rows that a `select` gives.
const SOURCE: &str = "upgrade_source";

/// Says what is done, beside the plan: what only going forward needs.
#[derive(Debug, Clone)]
pub struct Work {
    /// What is written where.
    pub plan: Plan,
    /// The expression for each column; none where a `select` gives the rows.
    pub expressions: Vec<String>,
    /// Which rows; with a `select` it stands there.
    pub filter: Option<String>,
    /// The query that gives the rows to insert.
    pub select: Option<String>,
    /// Whether each row is written once, although nothing on it shows that it was.
    pub once: bool,
    /// Whether the server returns the values before (from 18 on).
    pub returns_old: bool,
}

/// What every session of a backfill sets: keys and digests are texts, which these decide, and
/// each batch is planned for the range that it has.
pub fn settings(plan: &Plan) -> String {
    let scans = if plan.found == Found::Nothing { "" } else { "set enable_seqscan = off;" };
    format!(
        "set datestyle = 'ISO, YMD'; set intervalstyle = 'postgres'; set timezone = 'UTC'; set bytea_output = 'hex'; \
         set extra_float_digits = 3; set xmloption = 'content'; set jit = off; set plan_cache_mode = force_custom_plan; \
         {scans}"
    )
}

fn joined<T>(items: &[T], separator: &str, each: impl Fn(usize, &T) -> String) -> String {
    items.iter().enumerate().map(|(place, item)| each(place, item)).collect::<Vec<_>>().join(separator)
}

/// Digests values to what tells whether somebody changed them; as text, as that shows every bit.
fn digest(values: &[String]) -> String {
    match values {
        [one] => format!("coalesce(hashtextextended(({one})::text collate \"C\", 0), 0)"),
        many => format!(
            "hashtextextended(row({})::text collate \"C\", 0)",
            joined(many, ", ", |_, value| format!("({value})::text"))
        ),
    }
}

impl Plan {
    fn qualified(&self, column: &Column) -> String {
        format!("{}.{}", self.table.name, column.name)
    }

    fn inserts(&self) -> bool {
        self.found == Found::Nothing
    }

    /// The digest of what a row of the table holds in the columns that are written; of an inserted
    /// row, in all.
    fn digest_of_row(&self) -> String {
        if self.inserts() {
            return digest(&[format!("row({}.*)", self.table.name)]);
        }
        digest(&self.columns.iter().map(|column| self.qualified(column)).collect::<Vec<_>>())
    }

    /// Makes the table of batches: each with its place, how far it came, the keys that it wrote,
    /// what they held, and the digest of what they hold now.
    pub fn make_side(&self, side: &TableName) -> String {
        let mut columns = vec![
            "pass int not null".to_owned(),
            "range int not null".to_owned(),
            "number int not null".to_owned(),
            "upto text[]".to_owned(),
            "done bool not null".to_owned(),
            "walked int8 not null".to_owned(),
            "rows int8 not null".to_owned(),
            "still bool not null".to_owned(),
        ];
        columns.extend(self.key.iter().enumerate().map(|(n, column)| format!("k{n} {}[]", column.kept())));
        columns.extend(self.kept_columns().iter().enumerate().map(|(n, column)| format!("o{n} {}[]", column.kept())));
        columns.push("written int8[]".to_owned());
        // Keys and digests hardly compress, and trying takes longer than writing them.
        let external = joined(&self.key, "", |n, _| format!("alter column k{n} set storage external, "));
        format!(
            "create table if not exists {side} ({}, primary key (pass, range, number)); \
             alter table {side} {external} alter column written set storage external",
            columns.join(", ")
        )
    }

    fn kept(&self, side: &TableName) -> String {
        let names: Vec<String> = (0..self.key.len())
            .map(|n| format!("k{n}"))
            .chain((0..self.kept_columns().len()).map(|n| format!("o{n}")))
            .chain(["written".to_owned()])
            .collect();
        format!(
            "kept as materialized (select u.* from {side} as b, unnest({}) as u ({}) \
             where b.pass = $1 and b.range = $2 and b.number = $3)",
            joined(&names, ", ", |_, name| format!("b.{name}")),
            joined(&names, ", ", |_, name| format!("upgrade_{name}")),
        )
    }

    fn same_key(&self) -> String {
        joined(&self.key, " and ", |n, column| {
            format!("{} = kept.upgrade_k{n}::{}", self.qualified(column), column.declared)
        })
    }

    /// Puts one batch back; answers how many rows. `foreign_too` also those that were changed since.
    pub fn restore(&self, side: &TableName, foreign_too: bool) -> String {
        let (table, key) = (&self.table, self.same_key());
        let unchanged = match self.found {
            Found::Inverse(_) => String::new(),
            _ if foreign_too => String::new(),
            _ => format!(" and {} = kept.upgrade_written", self.digest_of_row()),
        };
        let put = match &self.found {
            Found::Nothing => format!("delete from {table} using kept where {key}{unchanged}"),
            found => {
                let set = joined(&self.columns, ", ", |n, column| {
                    let value = match found {
                        Found::Values => format!("kept.upgrade_o{n}::{}", column.declared),
                        Found::Inverse(expressions) => format!("({}\n)", expressions[n]),
                        Found::Null | Found::Nothing => "null".to_owned(),
                    };
                    format!("{} = {value}", column.name)
                });
                format!("update {table} set {set} from kept where {key}{unchanged}")
            }
        };
        format!("with {}, restored as ({put} returning 1) select count(*) from restored", self.kept(side))
    }

    /// Counts and names the rows of a batch that hold neither what was written nor what was found.
    pub fn foreign(&self, side: &TableName) -> Option<String> {
        let condition = match &self.found {
            Found::Inverse(_) => return None,
            Found::Nothing => String::new(),
            found => {
                let before: Vec<String> = (0..self.columns.len())
                    .map(|n| match found {
                        Found::Values => format!("kept.upgrade_o{n}::{}", self.columns[n].declared),
                        _ => "null::text".to_owned(),
                    })
                    .collect();
                format!(" where {} <> {}", self.digest_of_row(), digest(&before))
            }
        };
        let label = joined(&self.key, " || ', ' || ", |_, column| format!("{}::text", self.qualified(column)));
        Some(format!(
            "with {}, changed as (select {label} as key from kept join {} on {}{condition}) \
             select count(*), coalesce((array_agg(key order by key))[1:5], '{{}}') from changed",
            self.kept(side),
            self.table,
            self.same_key()
        ))
    }
}

impl Work {
    fn walks(&self) -> String {
        match &self.select {
            Some(select) => format!("({select}\n) as {SOURCE}"),
            None => self.plan.table.to_string(),
        }
    }

    fn walked(&self, column: &Column) -> String {
        match &self.select {
            Some(_) => format!("{SOURCE}.{}", column.name),
            None => self.plan.qualified(column),
        }
    }

    /// After `$1` and up to `$2`, each of which may be null.
    fn in_range(&self) -> String {
        let key = &self.plan.key;
        let row = |parameter: u8| {
            let values =
                joined(key, ", ", |n, column| format!("(${parameter}::text[])[{}]::{}", n + 1, column.declared));
            if key.len() == 1 { values } else { format!("({values})") }
        };
        let names = joined(key, ", ", |_, column| self.walked(column));
        let names = if key.len() == 1 { names } else { format!("({names})") };
        format!("($1::text[] is null or {names} > {}) and ($2::text[] is null or {names} <= {})", row(1), row(2))
    }

    /// Which rows are still to be written.
    pub fn pending(&self) -> String {
        if self.select.is_some() {
            let same = joined(&self.plan.key, " and ", |_, column| {
                format!("upgrade_present.{} = {SOURCE}.{}", column.name, column.name)
            });
            return format!("not exists (select from {} as upgrade_present where {same})", self.plan.table);
        }
        let filter = self.filter.as_ref().map_or_else(|| "true".to_owned(), |filter| format!("({filter}\n)"));
        if self.once {
            return filter;
        }
        let columns = &self.plan.columns;
        let value = |n: usize| format!("({}\n)::{}", self.expressions[n], columns[n].declared);
        // A row that would not change is not pending: where the expression is NULL too.
        let differs = match self.plan.found {
            Found::Null => format!("num_nonnulls({}) > 0", joined(columns, ", ", |n, _| value(n))),
            _ => format!(
                "row({})::record *<> row({})::record",
                joined(columns, ", ", |_, column| self.plan.qualified(column)),
                joined(columns, ", ", |n, _| value(n)),
            ),
        };
        format!("{filter} and {differs}")
    }

    /// Asks whether any row is still to be written.
    pub fn any_pending(&self) -> String {
        format!("select exists (select from {} where {})", self.walks(), self.pending())
    }

    /// Asks the planner how many rows are meant; it knows nothing of those that are as they should be.
    pub fn estimate(&self) -> String {
        let filter = self.filter.as_deref().unwrap_or("true");
        format!("explain (format json) select from {} where ({filter}\n)", self.walks())
    }

    /// Asks for the key at which a batch of `$3` + 1 rows ends; nothing if there are fewer.
    pub fn bound(&self, only_pending: bool) -> String {
        let names = joined(&self.plan.key, ", ", |_, column| self.walked(column));
        let texts = joined(&self.plan.key, ", ", |_, column| format!("{}::text", self.walked(column)));
        let pending = if only_pending { format!(" and {}", self.pending()) } else { String::new() };
        format!(
            "select array[{texts}] from {} where {}{pending} order by {names} offset $3 limit 1",
            self.walks(),
            self.in_range()
        )
    }

    /// Asks for the keys that part the table into `parts` ranges, from a sample of its pages.
    pub fn parting(&self, parts: usize, percent: f64) -> Option<String> {
        if self.select.is_some() {
            return None;
        }
        let key = &self.plan.key;
        let names = joined(key, ", ", |_, column| column.name.to_string());
        let texts = joined(key, ", ", |_, column| format!("{}::text", column.name));
        Some(format!(
            "select key from (select array[{texts}] as key, part, \
               lead(part) over (order by {names}) as next_part, row_number() over (order by {names}) as place \
             from (select {names}, ntile({parts}) over (order by {names}) as part \
               from {} tablesample system ({percent:.6})) as sampled) as parted \
             where next_part is distinct from part order by place",
            self.plan.table
        ))
    }

    /// Writes the rows of a range and, with them, that it is done: one statement.
    ///
    /// `$1` and `$2` are the range, `$3` to `$5` the batch's place, `$6` whether the range is done
    /// with it, `$7` how many rows were walked.
    pub fn write(&self, side: &TableName) -> String {
        let plan = &self.plan;
        let (table, key, kept) = (&plan.table, &plan.key, plan.kept_columns());
        let range = self.in_range();
        let pending = self.pending();
        let aggregated = |name: &str| format!("coalesce(array_agg({name}), '{{}}')");
        let as_kept = |value: String, column: &Column| match &column.element {
            Some(_) => value,
            None => format!("({value})::text"),
        };
        let keys = joined(key, ", ", |n, column| format!("{} as k{n}", as_kept(plan.qualified(column), column)));
        let mut before = String::new();
        let written = if let Some(select) = &self.select {
            let names = joined(&plan.columns, ", ", |_, column| column.name.to_string());
            let on = joined(key, ", ", |_, column| column.name.to_string());
            format!(
                "insert into {table} ({names}) select {names} from ({select}\n) as {SOURCE} where {range} and {pending} \
                 on conflict ({on}) do nothing returning {keys}, false as still, {} as written",
                plan.digest_of_row()
            )
        } else {
            let set = joined(&plan.columns, ", ", |n, column| format!("{} = ({}\n)", column.name, self.expressions[n]));
            let joins = !kept.is_empty() && !self.returns_old;
            let (from, condition) = if joins {
                // Of a row that is being changed by somebody else, the lock gives what they leave.
                let same = joined(key, " and ", |n, column| {
                    format!("{} = upgrade_batch.upgrade_k{n}", plan.qualified(column))
                });
                before = format!(
                    "upgrade_batch as materialized (select {}, {} from {table} where {range} and {pending} for no key update), ",
                    joined(key, ", ", |n, column| format!("{} as upgrade_k{n}", plan.qualified(column))),
                    joined(kept, ", ", |n, column| format!(
                        "{} as upgrade_o{n}",
                        as_kept(plan.qualified(column), column)
                    )),
                );
                (" from upgrade_batch", same)
            } else {
                ("", format!("{range} and {pending}"))
            };
            let with_old = if joins || kept.is_empty() { "" } else { "with (old as upgrade_old) " };
            let olds = joined(kept, "", |n, column| {
                let value = if joins {
                    format!("upgrade_batch.upgrade_o{n}")
                } else {
                    as_kept(format!("upgrade_old.{}", column.name), column)
                };
                format!(", {value} as o{n}")
            });
            let still = if self.once { "false".to_owned() } else { format!("({pending})") };
            format!(
                "update {table} set {set}{from} where {condition} returning {with_old}{keys}{olds}, {still} as still, {} as written",
                plan.digest_of_row()
            )
        };
        let names: Vec<String> = (0..key.len())
            .map(|n| format!("k{n}"))
            .chain((0..kept.len()).map(|n| format!("o{n}")))
            .chain(["written".to_owned()])
            .collect();
        format!(
            "with {before}written as ({written}) \
             insert into {side} (pass, range, number, upto, done, walked, rows, still, {}) \
             select $3, $4, $5, $2, $6, $7, count(*), coalesce(bool_or(still), false), {} from written \
             returning rows, still",
            names.join(", "),
            joined(&names, ", ", |_, name| aggregated(name)),
        )
    }
}

/// Says so of a statement that is built here, of quoted names and of what the pipeline states.
pub(crate) fn built(sql: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(sql.to_owned())
}

/// Asks the server whether a condition admits only NULL in a column: its plan is then empty.
pub fn refutes(table: &TableName, filter: &str, column: &Identifier) -> String {
    format!("explain (format json) select from {table} where ({filter}\n) and {}.{column} is not null", table.name)
}
