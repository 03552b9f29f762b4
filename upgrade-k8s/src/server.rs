//! Requests to an API server: each bounded, repeated where it may be, and named when it fails.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Method, Request};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};
use upgrade_core::context::Context;
use upgrade_core::error::{Conflict, StepError};
use url::form_urlencoded;

use crate::error::{Answer, KubeError, cancelled, found, not_cancelled};
use crate::kind::{Discovered, Kind};
use crate::naming::{is_ours, put_mark};
use crate::object::{Object, ObjectName};

/// The name under which the cluster records who owns a field.
pub const FIELD_MANAGER: &str = "upgrade";

/// How long a request is repeated that fails in a way that passes: an API server that is started anew is
/// back by then.
const PATIENCE: Duration = Duration::from_secs(30);
/// The first pause between two attempts; each one after it is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often an object is read anew because somebody wrote to it in between.
pub(crate) const WRITERS: u32 = 20;
/// How many objects are asked for at once.
const PAGE: &str = "500";

const JSON: &str = "application/json";
const JSON_PATCH: &str = "application/json-patch+json";
const APPLY_PATCH: &str = "application/apply-patch+yaml";

/// Speaks to the API server of a cluster, for one call of a step or check.
///
/// # Guarantees
/// A request that fails in a way that passes (429, 500, 502 to 504, a lost connection) is repeated with
/// growing pauses, as long as the server asks for, for 30 s at most. All that is changed is changed from a
/// state that was read to the one intended, so that a repeated request has no effect twice: it is refused
/// with a conflict, and the object is looked at again.
///
/// # Caveats
/// Cancelling ends pauses and reads at once; a request that changes something is awaited.
#[derive(Clone)]
pub struct ApiServer {
    client: Client,
    cx: Context,
    timeout: Duration,
    discovered: Arc<Mutex<Discovered>>,
}

/// Says how an object is deleted.
#[derive(Debug, Clone, Default)]
pub struct Deletion {
    /// The object must be this one.
    pub uid: Option<String>,
    /// Nobody must have written to it since it had this resource version.
    pub version: Option<String>,
    /// How long a pod may take to end; its own setting where this is none.
    pub grace: Option<Duration>,
    /// Leaves what the object owns where it is.
    pub orphan: bool,
}

/// One request.
struct Ask<'a> {
    method: Method,
    path: &'a str,
    query: &'a [(&'a str, &'a str)],
    body: Option<(&'static str, Vec<u8>)>,
}

impl ApiServer {
    pub(crate) fn new(client: Client, cx: &Context, timeout: Duration, discovered: Arc<Mutex<Discovered>>) -> Self {
        Self { client, cx: cx.clone(), timeout, discovered }
    }

    /// Returns the client, for what this type has no words for.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the call that this speaks for.
    pub(crate) fn context(&self) -> &Context {
        &self.cx
    }

    pub(crate) fn discovered(&self) -> Arc<Mutex<Discovered>> {
        self.discovered.clone()
    }

    /// Reads what is at an address.
    ///
    /// # Errors
    /// As [`ApiServer`] says.
    pub async fn get_path(
        &self,
        path: &str,
        query: &[(&str, &str)],
        doing: impl Fn() -> String,
    ) -> Result<Value, KubeError> {
        self.patiently(Ask { method: Method::GET, path, query, body: None }, &doing).await
    }

    /// Reads a text: a log.
    ///
    /// # Errors
    /// As the server answers; it is asked once, since what may pass is not worth waiting for here.
    pub async fn get_text(
        &self,
        path: &str,
        query: &[(&str, &str)],
        doing: impl Fn() -> String,
    ) -> Result<String, KubeError> {
        let body = self.send(&Ask { method: Method::GET, path, query, body: None }, &doing).await?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }

    /// Reads an object; none where there is no such object.
    ///
    /// # Errors
    /// As [`ApiServer`] says.
    pub async fn get(&self, name: &ObjectName) -> Result<Option<Object>, KubeError> {
        Ok(found(self.get_path(&name.path(), &[], || format!("reading {name}")).await)?.map(Object))
    }

    /// Reads an object that must be there.
    ///
    /// # Errors
    /// It is not there; and as [`ApiServer`] says.
    pub async fn require(&self, name: &ObjectName) -> Result<Object, StepError> {
        self.get(name).await?.ok_or_else(|| {
            let command = match &name.namespace {
                Some(namespace) => format!("kubectl get {} --namespace {namespace}", name.kind.plural),
                None => format!("kubectl get {}", name.kind.plural),
            };
            StepError::permanent(format!("{name} does not exist")).with_hint(format!("correct its name: `{command}`"))
        })
    }

    /// Lists the objects of a kind, in a namespace or in all, that a label selector and a field selector
    /// leave; an empty selector leaves all. Also returns the version of the list, from which a watch goes on.
    ///
    /// # Errors
    /// As [`ApiServer`] says.
    pub async fn list(
        &self,
        kind: &Kind,
        namespace: Option<&str>,
        labels: &str,
        fields: &str,
    ) -> Result<(Vec<Object>, String), KubeError> {
        let path = kind.path(namespace);
        let (mut objects, mut next) = (Vec::new(), String::new());
        loop {
            let mut query = vec![("limit", PAGE)];
            query.extend([("labelSelector", labels), ("fieldSelector", fields), ("continue", &*next)]);
            query.retain(|(_, value)| !value.is_empty());
            let answer = match self.get_path(&path, &query, || format!("listing {}", kind.plural)).await {
                // The pages that are left are of a state that the server no longer has.
                Err(error) if error.is_expired() && !next.is_empty() => {
                    objects.clear();
                    next.clear();
                    continue;
                }
                answer => Object(answer?),
            };
            // The members of a list do not say what they are.
            let whole = answer.list("/items").map(|item| {
                let mut item = item.clone();
                item["apiVersion"] = kind.api_version().into();
                item["kind"] = kind.kind.clone().into();
                Object(item)
            });
            objects.extend(whole);
            answer.text("/metadata/continue").clone_into(&mut next);
            if next.is_empty() {
                return Ok((objects, answer.text("/metadata/resourceVersion").to_owned()));
            }
        }
    }

    /// Creates an object.
    ///
    /// # Errors
    /// There is one already, which is a conflict; and as [`ApiServer`] says.
    pub async fn create(&self, name: &ObjectName, body: &Value) -> Result<Object, KubeError> {
        let path = name.kind.path(name.namespace.as_deref());
        let query = [("fieldManager", FIELD_MANAGER)];
        let body = Some((JSON, body.to_string().into_bytes()));
        let ask = Ask { method: Method::POST, path: &path, query: &query, body };
        self.patiently(ask, &|| format!("creating {name}")).await.map(Object)
    }

    /// Creates an object that the call's step makes, or finds the one that it made before: an answer that was
    /// lost, and a call that was cut off, make nothing twice.
    ///
    /// # Errors
    /// Somebody else made one of that name, which is a conflict; the call is cancelled; and as [`ApiServer`]
    /// says.
    pub async fn create_own(&self, name: &ObjectName, body: &Value) -> Result<Object, StepError> {
        let mut body = body.clone();
        put_mark(&mut body, &self.cx);
        let mut attempt = 1;
        loop {
            if let Some(there) = self.get_own(name).await? {
                return Ok(there);
            }
            not_cancelled(&self.cx)?;
            match self.create(name, &body).await {
                Err(error) if error.is_in_conflict() && attempt < WRITERS => attempt += 1,
                created => return Ok(created?),
            }
        }
    }

    /// Returns the object that the call's step made under this name, if it is there.
    ///
    /// # Errors
    /// Somebody else made one of that name, which is a conflict; and as [`ApiServer`] says.
    pub async fn get_own(&self, name: &ObjectName) -> Result<Option<Object>, StepError> {
        match self.get(name).await? {
            Some(there) if !is_ours(&there, &self.cx) => Err(StepError::conflict(Conflict {
                subject: name.to_string(),
                found: "absent".into(),
                intended: "made by this step".into(),
                present: "made by somebody else".into(),
            })),
            there => Ok(there),
        }
    }

    /// Asks whether the cluster would take an object, and creates nothing.
    ///
    /// Returns it as the cluster would store it.
    ///
    /// # Errors
    /// The cluster would refuse it; there is one already, which is a conflict; and as [`ApiServer`] says.
    pub async fn try_create(&self, name: &ObjectName, body: &Value) -> Result<Object, KubeError> {
        let path = name.kind.path(name.namespace.as_deref());
        let query = [("fieldManager", FIELD_MANAGER), ("dryRun", "All")];
        let body = Some((JSON, body.to_string().into_bytes()));
        let ask = Ask { method: Method::POST, path: &path, query: &query, body };
        self.patiently(ask, &|| format!("trying to create {name}")).await.map(Object)
    }

    /// Writes an object as a whole over the one that was read, told by the version in `body`.
    ///
    /// # Errors
    /// Somebody has written to it since it was read, which is a conflict; and as [`ApiServer`] says.
    pub async fn replace(&self, name: &ObjectName, body: &Value) -> Result<Object, KubeError> {
        let query = [("fieldManager", FIELD_MANAGER)];
        let body = Some((JSON, body.to_string().into_bytes()));
        let ask = Ask { method: Method::PUT, path: &name.path(), query: &query, body };
        self.patiently(ask, &|| format!("writing {name}")).await.map(Object)
    }

    /// Asks what a write of an object as a whole would make of it, and changes nothing.
    ///
    /// # Errors
    /// As [`ApiServer::replace`]; the cluster would refuse it.
    pub async fn try_replace(&self, name: &ObjectName, body: &Value) -> Result<Object, KubeError> {
        let query = [("fieldManager", FIELD_MANAGER), ("dryRun", "All")];
        let body = Some((JSON, body.to_string().into_bytes()));
        let ask = Ask { method: Method::PUT, path: &name.path(), query: &query, body };
        self.patiently(ask, &|| format!("trying to write {name}")).await.map(Object)
    }

    /// Changes an object by a JSON Patch, as [`crate::object::patch`] makes it.
    ///
    /// # Errors
    /// Somebody has written to it since it was read, which is a conflict; and as [`ApiServer`] says.
    pub async fn patch(&self, name: &ObjectName, patch: &Value) -> Result<Object, KubeError> {
        let query = [("fieldManager", FIELD_MANAGER)];
        let body = Some((JSON_PATCH, patch.to_string().into_bytes()));
        let ask = Ask { method: Method::PATCH, path: &name.path(), query: &query, body };
        self.patiently(ask, &|| format!("changing {name}")).await.map(Object)
    }

    /// Asks what a JSON Patch would make of an object, and changes nothing.
    ///
    /// # Errors
    /// The cluster would refuse it; and as [`ApiServer`] says.
    pub async fn try_patch(&self, name: &ObjectName, patch: &Value) -> Result<Object, KubeError> {
        let query = [("fieldManager", FIELD_MANAGER), ("dryRun", "All")];
        let body = Some((JSON_PATCH, patch.to_string().into_bytes()));
        let ask = Ask { method: Method::PATCH, path: &name.path(), query: &query, body };
        self.patiently(ask, &|| format!("trying to change {name}")).await.map(Object)
    }

    /// Applies an object on the server's side: its fields become this manager's. With `force`, also those
    /// that another manager owns; with `dry_run`, nothing is changed.
    ///
    /// # Errors
    /// Another manager owns a field, which is a conflict; and as [`ApiServer`] says.
    pub async fn apply(
        &self,
        name: &ObjectName,
        body: &Value,
        force: bool,
        dry_run: bool,
    ) -> Result<Object, KubeError> {
        let mut query = vec![("fieldManager", FIELD_MANAGER), ("force", if force { "true" } else { "false" })];
        if dry_run {
            query.push(("dryRun", "All"));
        }
        let body = Some((APPLY_PATCH, body.to_string().into_bytes()));
        let ask = Ask { method: Method::PATCH, path: &name.path(), query: &query, body };
        self.patiently(ask, &|| format!("applying {name}")).await.map(Object)
    }

    /// Deletes an object. One that does not exist, or is another one by now, is left alone.
    ///
    /// Returns before it is gone; [`ApiServer::await_gone`] waits.
    ///
    /// # Errors
    /// As [`ApiServer`] says.
    pub async fn delete(&self, name: &ObjectName, how: &Deletion) -> Result<(), KubeError> {
        let mut options = json!({
            "kind": "DeleteOptions", "apiVersion": "v1",
            "propagationPolicy": if how.orphan { "Orphan" } else { "Background" },
        });
        if let Some(uid) = &how.uid {
            options["preconditions"]["uid"] = json!(uid);
        }
        if let Some(version) = &how.version {
            options["preconditions"]["resourceVersion"] = json!(version);
        }
        if let Some(grace) = how.grace {
            options["gracePeriodSeconds"] = grace.as_secs().into();
        }
        let body = Some((JSON, options.to_string().into_bytes()));
        let ask = Ask { method: Method::DELETE, path: &name.path(), query: &[], body };
        match found(self.patiently(ask, &|| format!("deleting {name}")).await) {
            Err(error) if error.is_in_conflict() && how.uid.is_some() => Ok(()),
            done => done.map(drop),
        }
    }

    /// Waits until an object is gone, or another one has its name.
    ///
    /// # Errors
    /// The call is cancelled; and as [`ApiServer`] says.
    pub async fn await_gone(&self, name: &ObjectName, uid: &str) -> Result<(), StepError> {
        let mut pause = FIRST_PAUSE;
        while self.get(name).await?.is_some_and(|object| object.uid() == uid) {
            self.pause(pause).await?;
            pause = (pause * 2).min(Duration::from_secs(1));
        }
        Ok(())
    }

    /// Changes an object from the state in which it is found, however many others write to it.
    ///
    /// `decide` is given the object as it is, and answers with the JSON Patch that is needed, or with none
    /// where nothing is. It is asked again when somebody has written in between.
    ///
    /// # Errors
    /// The object does not exist, `decide` refuses, the call is cancelled; and as [`ApiServer`] says.
    pub async fn change(
        &self,
        name: &ObjectName,
        mut decide: impl FnMut(&Object) -> Result<Option<Value>, StepError>,
    ) -> Result<Object, StepError> {
        let mut attempt = 1;
        loop {
            let present = self.require(name).await?;
            let Some(patch) = decide(&present)? else { return Ok(present) };
            not_cancelled(&self.cx)?;
            match self.patch(name, &patch).await {
                Err(error) if error.is_in_conflict() && attempt < WRITERS => attempt += 1,
                // The object was deleted in between; the next look says so.
                Err(error) if error.is_missing() && attempt < WRITERS => attempt += 1,
                done => return Ok(done?),
            }
        }
    }

    /// Asks what a change would make of an object, as [`ApiServer::change`] would make it; nothing is changed.
    ///
    /// Returns the object as it is and as it would be.
    ///
    /// # Errors
    /// As [`ApiServer::change`]; the cluster would refuse it.
    pub async fn try_change(
        &self,
        name: &ObjectName,
        mut decide: impl FnMut(&Object) -> Result<Value, StepError>,
    ) -> Result<(Object, Object), StepError> {
        let mut attempt = 1;
        loop {
            let present = self.require(name).await?;
            match self.try_patch(name, &decide(&present)?).await {
                Err(error) if (error.is_in_conflict() || error.is_missing()) && attempt < WRITERS => attempt += 1,
                after => return Ok((present, after?)),
            }
        }
    }

    /// Sends a request once: what is refused now is refused, and the caller decides.
    ///
    /// # Errors
    /// As the server answers.
    pub async fn post_once(&self, path: &str, body: &Value, doing: impl Fn() -> String) -> Result<Value, KubeError> {
        let body = Some((JSON, body.to_string().into_bytes()));
        self.once(&Ask { method: Method::POST, path, query: &[], body }, &doing).await
    }

    /// Sends a request that asks and changes nothing, in a body: an access review.
    ///
    /// # Errors
    /// As [`ApiServer`] says.
    pub async fn review(&self, path: &str, body: &Value, doing: impl Fn() -> String) -> Result<Value, KubeError> {
        let body = Some((JSON, body.to_string().into_bytes()));
        self.patiently(Ask { method: Method::POST, path, query: &[], body }, &doing).await
    }

    /// Waits, unless the call is cancelled.
    ///
    /// # Errors
    /// The call is cancelled.
    pub async fn pause(&self, pause: Duration) -> Result<(), StepError> {
        tokio::select! {
            () = sleep(pause) => Ok(()),
            () = self.cx.cancelled().cancelled() => Err(cancelled()),
        }
    }

    /// Repeats a request as long as its failure may pass.
    async fn patiently(&self, ask: Ask<'_>, doing: &impl Fn() -> String) -> Result<Value, KubeError> {
        let until = Instant::now() + PATIENCE;
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match self.once(&ask, doing).await {
                Err(error) if error.is_passing() => error,
                done => return done,
            };
            let asked = error.answer().and_then(|answer| answer.retry_after).unwrap_or_default();
            let wait = pause.max(asked);
            if Instant::now() + wait > until {
                return Err(error);
            }
            tracing::debug!("{}; again in {wait:?}", doing());
            self.pause(wait).await?;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn once(&self, ask: &Ask<'_>, doing: &impl Fn() -> String) -> Result<Value, KubeError> {
        let body = self.send(ask, doing).await?;
        serde_json::from_slice(&body)
            .map_err(|source| KubeError::Lost { doing: doing(), source: kube::Error::SerdeError(source) })
    }

    async fn send(&self, ask: &Ask<'_>, doing: &impl Fn() -> String) -> Result<Vec<u8>, KubeError> {
        let request = request(ask).map_err(|error| {
            StepError::permanent(format!("{} failed: {} is no address", doing(), ask.path)).with_cause(&error)
        })?;
        let work = async {
            let answer = self.client.send(request).await?;
            let (parts, body) = answer.into_parts();
            Ok((parts, body.collect_bytes().await?))
        };
        let answer = if ask.method == Method::GET {
            tokio::select! {
                answer = timeout(self.timeout, work) => answer,
                () = self.cx.cancelled().cancelled() => return Err(cancelled().into()),
            }
        } else {
            timeout(self.timeout, work).await
        };
        let (parts, body) = match answer {
            Ok(answer) => answer.map_err(|source| KubeError::Lost { doing: doing(), source })?,
            Err(_) => {
                let late = format!("the API server did not answer within {} s", self.timeout.as_secs_f32());
                let source = kube::Error::ReadEvents(std::io::Error::new(std::io::ErrorKind::TimedOut, late));
                return Err(KubeError::Lost { doing: doing(), source });
            }
        };
        if !parts.status.is_success() {
            let seconds = parts.headers.get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
            let answer = Answer::read(parts.status.as_u16(), seconds.map(Duration::from_secs), &body);
            return Err(KubeError::Refused { doing: doing(), answer });
        }
        Ok(body.to_vec())
    }
}

fn request(ask: &Ask<'_>) -> Result<Request<Body>, http::Error> {
    let request = Request::builder().method(ask.method.clone()).uri(address(ask.path, ask.query));
    let request = request.header("accept", JSON);
    match &ask.body {
        Some((kind, body)) => request.header("content-type", *kind).body(Body::from(body.clone())),
        None => request.body(Body::empty()),
    }
}

/// Joins a path and a query, encoded.
pub(crate) fn address(path: &str, query: &[(&str, &str)]) -> String {
    if query.is_empty() {
        return path.to_owned();
    }
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(query).finish();
    format!("{path}?{query}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_encoded() {
        assert_eq!(address("/a", &[]), "/a");
        assert_eq!(
            address("/a", &[("labelSelector", "app=web,x in (y)")]),
            "/a?labelSelector=app%3Dweb%2Cx+in+%28y%29"
        );
    }
}
