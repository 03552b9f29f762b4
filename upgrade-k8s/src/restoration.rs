//! Objects put back: what was found of one, what is intended, and the way from either to the other.
//!
//! ```text
//!                 apply                       apply
//!   found ────────────────────▶ intended   absent ──────▶ made
//!     ▲                            │          ▲            │
//!     └──────── put_back ──────────┘          └─ put_back ─┘
//!
//!   neither of them: somebody else was there, and it is a conflict
//! ```
//!
//! Both states are judged by the fields that the step changes. What controllers and other people do to
//! other fields meanwhile is neither a conflict nor lost when the object is put back.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use upgrade_core::context::{Context, OnConflict};
use upgrade_core::error::{Conflict, StepError};
use upgrade_core::sealed::SealedRef;

use crate::difference::{covers, differences, lacks, project, revert};
use crate::error::not_cancelled;
use crate::kept::{keep, kept};
use crate::naming::{is_ours, put_marker};
use crate::object::{Object, ObjectName, digest};
use crate::server::{ApiServer, Deletion, WRITERS};

/// Holds what putting one object back needs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restoration {
    /// The object.
    pub object: ObjectName,
    /// What tells the one that was found from another of that name; none where there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// What was found and what is intended, sealed: either may hold secrets.
    states: SealedRef,
}

/// Holds both states, without what the server sets.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct States {
    /// What was found; none where there was no such object.
    pub found: Option<Value>,
    /// What the server makes of it.
    pub after: Value,
    /// The fields of it that are ours.
    pub intended: Value,
}

/// Says how an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// As it was found.
    Found,
    /// As intended.
    Intended,
    /// Neither.
    Elsewhere,
}

impl States {
    /// Makes them of what is there, what the server would store, and what was written down.
    pub fn new(present: Option<&Object>, after: &Object, asked: &Value) -> Self {
        let after = after.as_written().0;
        let mut intended = project(&after, asked);
        if let Some(map) = intended.as_object_mut() {
            map.remove("status");
        }
        Self { found: present.map(|object| object.as_written().0), after, intended }
    }

    /// Tells whether there is nothing to do.
    pub fn are_equal(&self) -> bool {
        self.found.as_ref() == Some(&self.after)
    }

    /// Says in short lines what changes; of a Secret, without its values.
    pub fn differences(&self) -> Vec<String> {
        let is_secret = self.after["kind"] == "Secret";
        differences(self.found.as_ref().unwrap_or(&Value::Null), &self.after, is_secret)
    }

    fn at(&self, present: Option<&Object>, cx: &Context) -> At {
        match (present, &self.found) {
            (None, None) => At::Found,
            (None, Some(_)) => At::Elsewhere,
            (Some(present), found) => {
                let written = present.as_written().0;
                match found {
                    Some(found) if revert(&written, found, &self.after) == written => At::Found,
                    Some(found) if covers(&written, &self.intended) && lacks(&written, found, &self.after) => {
                        At::Intended
                    }
                    None if covers(&written, &self.intended) && is_ours(present, cx) => At::Intended,
                    _ => At::Elsewhere,
                }
            }
        }
    }
}

impl Restoration {
    /// Records both states of an object, durably.
    ///
    /// # Errors
    /// They cannot be kept.
    pub async fn record(
        cx: &Context,
        object: ObjectName,
        present: Option<&Object>,
        states: &States,
    ) -> Result<Self, StepError> {
        Ok(Self { object, uid: present.map(|object| object.uid().to_owned()), states: keep(cx, states).await? })
    }

    /// Returns both states.
    ///
    /// # Errors
    /// They are gone or damaged.
    pub async fn states(&self, cx: &Context) -> Result<States, StepError> {
        kept(cx, &self.states, &self.object).await
    }

    /// Looks how the object is; what is neither as found nor as intended is a conflict, unless the step is
    /// to win.
    ///
    /// # Errors
    /// It is a conflict; the cluster cannot be asked.
    pub async fn look(
        &self,
        server: &ApiServer,
        cx: &Context,
        states: &States,
    ) -> Result<(Option<Object>, At), StepError> {
        let present = server.get(&self.object).await?;
        let at = match (&present, &self.uid) {
            (Some(present), Some(uid)) if present.uid() != uid => At::Elsewhere,
            _ => states.at(present.as_ref(), cx),
        };
        if at == At::Elsewhere && cx.on_conflict() == OnConflict::Stop {
            return Err(self.conflict(states, present.as_ref()));
        }
        Ok((present, at))
    }

    /// Brings the object from what was found to what is intended; what is made bears the mark of the step.
    ///
    /// # Errors
    /// It is neither, which is a conflict; and as [`ApiServer`] says.
    pub async fn carry_out(&self, server: &ApiServer, cx: &Context) -> Result<(), StepError> {
        let states = self.states(cx).await?;
        let mut attempt = 1;
        loop {
            let (present, at) = self.look(server, cx, &states).await?;
            if at == At::Intended {
                return Ok(());
            }
            not_cancelled(cx)?;
            let done = match (&states.found, present) {
                (Some(found), Some(present)) => {
                    // The same as taking back, the other way round.
                    server.replace(&self.object, &revert(&present.0, &states.after, found)).await
                }
                (_, Some(present)) => {
                    server.replace(&self.object, &revert(&present.0, &states.after, &Value::Null)).await
                }
                (_, None) => {
                    let mut body = states.after.clone();
                    put_marker(&mut body, cx);
                    server.create(&self.object, &body).await
                }
            };
            match done {
                // Somebody wrote in between: it is looked at again.
                Err(error) if error.is_in_conflict() && attempt < WRITERS => attempt += 1,
                done => return Ok(done.map(drop)?),
            }
        }
    }

    /// Puts the object back: the fields that were changed as they were found, all others as they are; what
    /// was not there is deleted, what is gone is made again.
    ///
    /// # Errors
    /// Somebody else has changed the same fields, which is a conflict; and as [`ApiServer`] says.
    pub async fn put_back(&self, server: &ApiServer, cx: &Context) -> Result<(), StepError> {
        let states = self.states(cx).await?;
        let mut attempt = 1;
        loop {
            let (present, at) = self.look(server, cx, &states).await?;
            if at == At::Found {
                return Ok(());
            }
            not_cancelled(cx)?;
            let done = match (&states.found, present) {
                (None, None) => return Ok(()),
                (None, Some(present)) => {
                    let how = Deletion { uid: Some(present.uid().to_owned()), ..Deletion::default() };
                    server.delete(&self.object, &how).await?;
                    return server.await_gone(&self.object, present.uid()).await;
                }
                (Some(found), None) => server.create(&self.object, found).await,
                (Some(found), Some(present)) => {
                    server.replace(&self.object, &revert(&present.0, found, &states.after)).await
                }
            };
            match done {
                // Somebody wrote in between: it is looked at again.
                Err(error) if error.is_in_conflict() && attempt < WRITERS => attempt += 1,
                done => return Ok(done.map(drop)?),
            }
        }
    }

    fn conflict(&self, states: &States, present: Option<&Object>) -> StepError {
        let short = |value: &Value| digest(value).chars().take(19).collect::<String>();
        let absent = || "absent".to_owned();
        StepError::conflict(Conflict {
            subject: self.object.to_string(),
            found: states.found.as_ref().map_or_else(absent, short),
            intended: short(&states.after),
            present: present.map_or_else(absent, |object| short(&object.as_written().0)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use upgrade_core::testkit::TestContext;

    fn object(value: &str, more: &str, made_by: Option<&Context>) -> Object {
        let mut object = json!({ "apiVersion": "v1", "kind": "ConfigMap", "data": { "key": value, "more": more },
            "metadata": { "name": "x", "uid": "u" } });
        if let Some(cx) = made_by {
            put_marker(&mut object, cx);
        }
        Object(object)
    }

    #[test]
    fn a_state_is_judged_by_what_is_ours() {
        let (run, other) = (TestContext::new("x"), TestContext::new("y"));
        let (ours, theirs) = (&run.forward(), &other.forward());
        let asked =
            json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "x" }, "data": { "key": "new" } });
        let changed = States::new(Some(&object("old", "1", None)), &object("new", "1", None), &asked);
        assert_eq!(changed.differences(), ["data.key: old -> new"]);
        for (present, at) in [
            (Some(object("old", "1", None)), At::Found),
            (Some(object("old", "2", None)), At::Found),
            (Some(object("new", "2", None)), At::Intended),
            (Some(object("else", "1", None)), At::Elsewhere),
            (None, At::Elsewhere),
        ] {
            assert_eq!(changed.at(present.as_ref(), &run.back()), at, "{present:?}");
        }
        let made = States::new(None, &object("new", "1", Some(ours)), &asked);
        for (present, at) in [
            (None, At::Found),
            (Some(object("new", "2", Some(ours))), At::Intended),
            (Some(object("new", "1", Some(theirs))), At::Elsewhere),
            (Some(object("new", "1", None)), At::Elsewhere),
            (Some(object("else", "1", Some(ours))), At::Elsewhere),
        ] {
            assert_eq!(made.at(present.as_ref(), &run.back()), at, "{present:?}");
        }
    }
}
