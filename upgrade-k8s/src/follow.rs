//! Objects followed as they change: one list, one watch, and a list again when the watch cannot be trusted.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::time::Duration;

use futures_util::{FutureExt as _, Stream, StreamExt as _};
use http::Request;
use kube::core::WatchEvent;
use serde_json::Value;
use tokio::time::{Timeout, timeout};
use upgrade_core::error::StepError;

use crate::error::{Answer, KubeError, cancelled};
use crate::kind::Kind;
use crate::object::Object;
use crate::server::{ApiServer, address};

/// How long a watch may be silent before the objects are listed again: a connection that died without a
/// word looks the same.
const SILENCE: Duration = Duration::from_secs(10);
/// The pause before a watch is opened again that ended at once.
const REOPEN: Duration = Duration::from_millis(200);

/// What is remembered of an object.
type Keep<T> = Box<dyn Fn(&Object) -> Option<T> + Send>;
type Events = Pin<Box<dyn Stream<Item = Result<WatchEvent<Value>, kube::Error>> + Send>>;
/// A watch that is being opened.
type Opening = Pin<Box<Timeout<Opened>>>;
type Opened = Pin<Box<dyn Future<Output = Result<Events, kube::Error>> + Send>>;

/// Follows the objects of a kind, keeping of each what is of interest.
///
/// ```text
///            list                 watch
///  unknown ───────▶ known ───────────────────▶ watching ──┐
///     ▲                ▲                          │  │    │ event: known anew
///     │                └──────── stream ended ────┘  │ ◀──┘
///     └───────────────── 410, error, silence ────────┘
/// ```
///
/// # Guarantees
/// After each [`Follow::changed`], [`Follow::objects`] is a state that the cluster had, and no older than
/// the one before. A dropped watch, a restarted server and an expired version lose nothing: they cost a list.
pub struct Follow<T> {
    server: ApiServer,
    kind: Kind,
    namespace: Option<String>,
    labels: String,
    fields: String,
    keep: Keep<T>,
    objects: BTreeMap<String, T>,
    version: Option<String>,
    events: Option<Events>,
    opening: Option<Opening>,
}

impl ApiServer {
    /// Follows the objects of a kind in a namespace that a label selector leaves. `keep` says what is
    /// remembered of each; what it answers with none for is not.
    pub fn follow<T>(
        &self,
        kind: Kind,
        namespace: Option<&str>,
        labels: &str,
        keep: impl Fn(&Object) -> Option<T> + Send + 'static,
    ) -> Follow<T> {
        Follow {
            server: self.clone(),
            kind,
            namespace: namespace.map(str::to_owned),
            labels: labels.to_owned(),
            fields: String::new(),
            keep: Box::new(keep),
            objects: BTreeMap::new(),
            version: None,
            events: None,
            opening: None,
        }
    }
}

impl<T> Follow<T> {
    /// Follows only what a field selector leaves, too: the pods of one node by `spec.nodeName=NAME`.
    #[must_use]
    pub fn with_fields(mut self, fields: impl Into<String>) -> Self {
        self.fields = fields.into();
        self
    }

    /// Returns what is kept of the objects, by uid.
    pub fn objects(&self) -> &BTreeMap<String, T> {
        &self.objects
    }

    /// Returns the namespace that is looked at; none for all.
    pub fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    /// Waits until there is something new; the first call lists. It may also return with nothing new.
    ///
    /// May be dropped at any point and called again.
    ///
    /// # Errors
    /// The call is cancelled; the cluster cannot be asked, for longer than [`ApiServer`] is patient.
    pub async fn changed(&mut self) -> Result<(), KubeError> {
        let Some(version) = self.version.clone() else { return self.list().await };
        if self.events.is_none() {
            let path = self.kind.path(self.namespace.as_deref());
            let mut query = vec![("watch", "true"), ("allowWatchBookmarks", "true"), ("timeoutSeconds", "300")];
            query.push(("resourceVersion", &version));
            if !self.labels.is_empty() {
                query.push(("labelSelector", &self.labels));
            }
            if !self.fields.is_empty() {
                query.push(("fieldSelector", &self.fields));
            }
            let request = Request::get(address(&path, &query)).header("accept", "application/json").body(Vec::new());
            let request =
                request.map_err(|error| StepError::permanent(format!("{path} is no address")).with_cause(&error))?;
            let client = self.server.client().clone();
            // Whoever waits for several may drop this call: the watch that is being opened goes on being opened.
            let opening = self.opening.get_or_insert_with(|| {
                let opened: Opened =
                    Box::pin(async move { Ok(Box::pin(client.request_events::<Value>(request).await?) as Events) });
                Box::pin(timeout(SILENCE, opened))
            });
            let opened = opening.await;
            self.opening = None;
            match opened {
                Ok(Ok(events)) => self.events = Some(events),
                // Who may list and not watch would list for ever, without a pause.
                Ok(Err(kube::Error::Api(status))) if status.code == 403 => {
                    let answer = Answer {
                        status: status.code,
                        reason: status.reason,
                        message: status.message,
                        causes: Vec::new(),
                        retry_after: None,
                    };
                    return Err(KubeError::Refused { doing: format!("watching {}", self.kind.plural), answer });
                }
                // Whatever else it was, a list tells: it fails with a reason, or goes on from now.
                Ok(Err(error)) => return self.begin_anew(&error.to_string()).await,
                Err(_) => return self.begin_anew("no answer").await,
            }
        }
        let Some(events) = &mut self.events else { return Ok(()) };
        let first = tokio::select! {
            first = timeout(SILENCE, events.next()) => first,
            () = self.server.context().cancelled().cancelled() => return Err(cancelled().into()),
        };
        let mut event = match first {
            Ok(Some(event)) => Some(event),
            Ok(None) => {
                self.events = None;
                return Ok(self.server.pause(REOPEN).await?);
            }
            Err(_) => return self.begin_anew("silence").await,
        };
        // What came together is answered to together.
        while let Some(one) = event.take() {
            if let Err(reason) = self.take(one) {
                return self.begin_anew(&reason).await;
            }
            event = self.events.as_mut().and_then(|events| events.next().now_or_never()).flatten();
        }
        Ok(())
    }

    fn take(&mut self, event: Result<WatchEvent<Value>, kube::Error>) -> Result<(), String> {
        let object = match event {
            Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                let object = Object(object);
                match (self.keep)(&object) {
                    Some(kept) => self.objects.insert(object.uid().to_owned(), kept),
                    None => self.objects.remove(object.uid()),
                };
                object
            }
            Ok(WatchEvent::Deleted(object)) => {
                let object = Object(object);
                self.objects.remove(object.uid());
                object
            }
            Ok(WatchEvent::Bookmark(bookmark)) => {
                self.version = Some(bookmark.metadata.resource_version);
                return Ok(());
            }
            Ok(WatchEvent::Error(status)) => return Err(status.message.clone()),
            Err(error) => return Err(error.to_string()),
        };
        self.version = Some(object.resource_version().to_owned());
        Ok(())
    }

    async fn begin_anew(&mut self, reason: &str) -> Result<(), KubeError> {
        tracing::debug!("the watch of {} is begun anew: {reason}", self.kind.plural);
        self.events = None;
        self.list().await
    }

    async fn list(&mut self) -> Result<(), KubeError> {
        self.version = None;
        let namespace = self.namespace.as_deref();
        let (objects, version) = self.server.list(&self.kind, namespace, &self.labels, &self.fields).await?;
        self.objects = objects
            .iter()
            .filter_map(|object| (self.keep)(object).map(|kept| (object.uid().to_owned(), kept)))
            .collect();
        self.version = Some(version);
        Ok(())
    }
}
