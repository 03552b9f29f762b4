//! A world of a few texts, and steps that change them: what the sweeps themselves are tried on.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::check::Check;
use crate::context::{Context, OnConflict};
use crate::error::{CheckError, Conflict, StepError};
use crate::step::{Change, Effect, Prepared, Rollback, Step};
use crate::verdict::Verdict;

/// Holds texts by name; clones share them.
#[derive(Debug, Clone, Default)]
pub struct ToyWorld {
    texts: Arc<Mutex<BTreeMap<String, String>>>,
}

impl ToyWorld {
    /// Makes a world with these texts.
    pub fn new<const N: usize>(texts: [(&str, &str); N]) -> Self {
        let texts = texts.into_iter().map(|(name, text)| (name.to_owned(), text.to_owned())).collect();
        Self { texts: Arc::new(Mutex::new(texts)) }
    }

    fn texts(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.texts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a text.
    pub fn get(&self, name: &str) -> Option<String> {
        self.texts().get(name).cloned()
    }

    /// Writes or removes a text.
    pub fn put(&self, name: &str, text: Option<&str>) {
        match text {
            Some(text) => self.texts().insert(name.to_owned(), text.to_owned()),
            None => self.texts().remove(name),
        };
    }

    /// Writes the whole world down.
    pub fn observe(&self) -> String {
        format!("{:?}", self.texts())
    }
}

/// Sets one text of a [`ToyWorld`].
#[derive(Debug, Clone)]
pub struct SetText {
    world: ToyWorld,
    name: String,
    text: String,
}

impl SetText {
    /// Sets the text `name` to `text`.
    pub fn new(world: &ToyWorld, name: &str, text: &str) -> Self {
        Self { world: world.clone(), name: name.to_owned(), text: text.to_owned() }
    }

    fn conflict(&self, undo: &Found, present: &Option<String>) -> StepError {
        let shown = |text: &Option<String>| text.clone().unwrap_or_else(|| "nothing".into());
        StepError::conflict(Conflict {
            subject: self.name.clone(),
            found: shown(&undo.found),
            intended: self.text.clone(),
            present: shown(present),
        })
    }

    fn move_to(&self, cx: &Context, undo: &Found, goal: Option<&str>) -> Result<(), StepError> {
        let present = self.world.get(&self.name);
        let ours = present == undo.found || present.as_deref() == Some(&self.text);
        if !ours && cx.on_conflict() == OnConflict::Stop {
            return Err(self.conflict(undo, &present));
        }
        self.world.put(&self.name, goal);
        Ok(())
    }
}

/// Keeps what [`SetText`] found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Found {
    found: Option<String>,
}

#[async_trait]
impl Step for SetText {
    const KIND: &'static str = "toy.set";
    type Undo = Found;
    type Output = String;

    async fn prepare(&self, _cx: &Context) -> Result<Prepared<Found, String>, StepError> {
        let found = self.world.get(&self.name);
        if found.as_deref() == Some(&self.text) {
            return Ok(Prepared::unchanged(self.text.clone(), "it reads so already"));
        }
        let change = Change::new(Effect::Modify, &self.name).with_summary(format!("becomes {}", self.text));
        Ok(Prepared::change(Found { found }, [change]))
    }

    async fn apply(&self, cx: &Context, undo: &Found) -> Result<String, StepError> {
        self.move_to(cx, undo, Some(&self.text))?;
        // A point at which a crash can meet a change that nobody has acknowledged.
        tokio::task::yield_now().await;
        Ok(self.text.clone())
    }

    fn definition(&self) -> Value {
        json!({ "name": self.name, "text": self.text })
    }
}

#[async_trait]
impl Rollback for SetText {
    async fn rollback(&self, cx: &Context, undo: &Found, _output: Option<&String>) -> Result<(), StepError> {
        self.move_to(cx, undo, undo.found.as_deref())
    }
}

/// Passes if a text of a [`ToyWorld`] reads as expected.
#[derive(Debug, Clone)]
pub struct TextIs {
    world: ToyWorld,
    name: String,
    text: String,
}

impl TextIs {
    /// Expects the text `name` to be `text`.
    pub fn new(world: &ToyWorld, name: &str, text: &str) -> Self {
        Self { world: world.clone(), name: name.to_owned(), text: text.to_owned() }
    }
}

#[async_trait]
impl Check for TextIs {
    async fn check(&self, _cx: &Context) -> Result<Verdict, CheckError> {
        Ok(match self.world.get(&self.name) {
            Some(text) if text == self.text => Verdict::pass("it reads as expected"),
            other => Verdict::fail(format!("{} reads {other:?}, not {:?}", self.name, self.text)),
        })
    }

    fn kind(&self) -> &str {
        "toy.is"
    }
}
