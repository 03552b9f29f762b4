//! The pages of the kinds: there is one for each, its examples load, and it names every key.

#![cfg(test)]

use upgrade_core::testkit::Pages;

fn pages() -> Pages {
    // What the examples take for granted: a target of that name.
    let directory = tempfile::tempdir().unwrap();
    let kubeconfig = directory.path().join("config");
    let text = "clusters: [{ name: c, cluster: { server: \"https://127.0.0.1:1\" } }]\n\
                contexts: [{ name: x, context: { cluster: c } }]\ncurrent-context: x\n";
    std::fs::write(&kubeconfig, text).unwrap();
    Pages::new(upgrade_k8s::register, crate::world::build_context(&kubeconfig, "shop"), env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn every_kind_has_a_page_whose_examples_load() {
    pages().have_examples_that_load();
}

#[test]
fn every_page_names_every_key() {
    pages().name_every_key();
}

#[test]
fn the_list_of_kinds_and_the_readme_are_complete() {
    pages().are_all_listed();
}

#[test]
fn every_kind_says_what_it_does_in_the_same_way() {
    pages().have_a_line_each();
}
