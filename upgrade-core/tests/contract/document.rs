//! The contract's own page names tests that are there.

use std::path::Path;

/// Reads the rows of the table: number and the tests that it names.
fn rows(page: &str) -> Vec<(u32, Vec<&str>)> {
    page.lines()
        .filter_map(|line| {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let number = cells.get(1)?.parse().ok()?;
            let tests = cells.get(3)?.split('`').skip(1).step_by(2).collect();
            Some((number, tests))
        })
        .collect()
}

#[test]
fn every_point_names_tests_that_are_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = std::fs::read_to_string(root.join("../docs/contract.md")).unwrap();
    let rows = rows(&page);
    assert_eq!(rows.iter().map(|(number, _)| *number).collect::<Vec<_>>(), (1..=17).collect::<Vec<_>>());
    for (number, tests) in rows {
        assert!(!tests.is_empty(), "point {number} names no test");
        for test in tests {
            let (file, name) = test.rsplit_once("::").unwrap_or_else(|| panic!("`{test}` is not FILE::TEST"));
            let file = root.join("tests").join(file.replace("::", "/")).with_extension("rs");
            let file = if file.exists() { file } else { file.with_extension("").join("main.rs") };
            let source = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            assert!(source.contains(&format!("fn {name}(")), "point {number}: there is no test `{test}`");
        }
    }
}
