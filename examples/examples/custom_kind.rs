//! Loads a pipeline file that uses a kind of step and a kind of check of this program's own.
//!
//! cargo run -p upgrade-examples --example custom_kind

use std::error::Error;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use upgrade_core::AnyStep;
use upgrade_core::executor::{Executor, Interrupt, Outcome, RunOptions};
use upgrade_core::file::{self, LoadOptions};
use upgrade_core::journal::MemoryJournal;
use upgrade_core::registry::{BuildError, Registry};
use upgrade_examples::{LeadsTo, PointLink};

const FILE: &str = r#"
upgrade: dataset
to: 2.0.0
vars: { link: dataset }
steps:
  - id: link
    uses: example.link
    with: { link: "${link}", target: "dataset-${to}" }
verify:
  - uses: example.leads_to
    with: { link: "${link}", text: two }
"#;

/// Knows the kinds of this machine and those of this program.
fn registry() -> Registry {
    let mut registry = Registry::new();
    upgrade_host::register(&mut registry);
    registry.step("example.link", "Points a symbolic link.", |config: PointLink, cx| {
        if config.target.as_os_str().is_empty() {
            return Err(BuildError::new("the target is empty").at("target"));
        }
        Ok(AnyStep::reversible(PointLink { link: cx.path(&config.link), ..config }))
    });
    registry.check("example.leads_to", "Finds a text behind a link.", |config: LeadsTo, cx| {
        Ok(LeadsTo { link: cx.path(&config.link), ..config })
    });
    registry
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    fs::write(directory.path().join("dataset-2.0.0"), "two")?;
    std::os::unix::fs::symlink("dataset-1.0.0", directory.path().join("dataset"))?;
    let registry = registry();
    let parse =
        |text: &str| file::parse(text, Path::new("dataset.yaml"), directory.path(), &LoadOptions::default(), &registry);

    // A mistyped key is shown at its line, also in a kind that the library does not know.
    let error = parse(&FILE.replace("target:", "taget:")).err().ok_or("the mistake was not found")?;
    println!("{}", error.render(false));
    assert_eq!(error.line(), Some(8));

    let executor = Executor::new(Arc::new(MemoryJournal::new()));
    let report = executor.run(&parse(FILE)?, &RunOptions::default(), &Interrupt::new()).await?;
    assert_eq!(report.outcome, Outcome::Committed);
    assert_eq!(fs::read_link(directory.path().join("dataset"))?, Path::new("dataset-2.0.0"));
    println!("committed: {}", report.run);
    Ok(())
}
