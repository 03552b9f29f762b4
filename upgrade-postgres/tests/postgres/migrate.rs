//! `postgres.migrate` and `postgres.migrations`, directly: histories of other tools, contradictions,
//! scripts that fail, several at once.

#![cfg(test)]

mod alembic;
mod directory;
mod histories;
mod history_of_an_application;
mod refusals;
mod together;
mod undone;
