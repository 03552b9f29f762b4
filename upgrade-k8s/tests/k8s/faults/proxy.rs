//! A proxy before an API server that lets one request go wrong.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt as _;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kube::Client;
use kube::client::Body;
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use serde_json::json;
use tempfile::TempDir;
use tokio::net::TcpListener;

type Answer = Response<UnsyncBoxBody<Bytes, std::io::Error>>;

/// What goes wrong with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Somebody has written in between (409); of what writes nothing, an internal error.
    Conflict,
    /// The server asks to wait a second (429).
    TooMany,
    /// The server fails (500).
    Internal,
    /// The connection is lost before the server sees the request.
    LostRequest,
    /// The server does what is asked, and the connection is lost before it can say so.
    LostAnswer,
    /// The server takes longer than is waited for, and does what is asked then.
    Late,
    /// What is watched is no longer known from that version on (410); of what is no watch, an internal error.
    Expired,
}

impl Fault {
    pub(crate) const ALL: [Self; 7] =
        [Self::Conflict, Self::TooMany, Self::Internal, Self::LostRequest, Self::LostAnswer, Self::Late, Self::Expired];
}

/// How long clients of the proxy wait for an answer.
pub(crate) const TIMEOUT: &str = "2s";
const LATE: Duration = Duration::from_millis(2_500);

/// What was asked, and what is to go wrong.
#[derive(Default)]
struct Plan {
    asked: Vec<String>,
    fault: Option<(usize, Fault)>,
}

/// Listens on loopback until it is dropped.
pub(crate) struct Proxy {
    plan: Arc<Mutex<Plan>>,
    directory: TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl Proxy {
    /// Stands before the API server of a kubeconfig.
    pub(crate) fn before(kubeconfig: &Path) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let plan = Arc::new(Mutex::new(Plan::default()));
        let (listener, client) = runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let kubeconfig = Kubeconfig::read_from(kubeconfig).unwrap();
            let mut config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
            config.default_retry = false;
            (listener, Client::try_from(config).unwrap())
        });
        let port = listener.local_addr().unwrap().port();
        runtime.spawn(serve(listener, client, plan.clone()));
        let directory = tempfile::tempdir().unwrap();
        let text = format!(
            "clusters: [{{ name: c, cluster: {{ server: \"http://127.0.0.1:{port}\" }} }}]\n\
             contexts: [{{ name: x, context: {{ cluster: c }} }}]\ncurrent-context: x\n"
        );
        std::fs::write(directory.path().join("config"), text).unwrap();
        Self { plan, directory, _runtime: runtime }
    }

    /// Returns the kubeconfig that leads through it.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("config")
    }

    /// Lets the request of this number go wrong, counted from zero and from now.
    pub(crate) fn fail(&self, fault: Option<(usize, Fault)>) {
        *self.plan.lock().unwrap() = Plan { asked: Vec::new(), fault };
    }

    /// Returns what has been asked since.
    pub(crate) fn asked(&self) -> Vec<String> {
        self.plan.lock().unwrap().asked.clone()
    }
}

async fn serve(listener: TcpListener, client: Client, plan: Arc<Mutex<Plan>>) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (client, plan) = (client.clone(), plan.clone());
        tokio::spawn(async move {
            let service = service_fn(move |request| {
                let fault = plan.lock().unwrap().next(&request);
                answer(client.clone(), request, fault)
            });
            // A connection that is to be lost ends with the error that says so.
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        });
    }
}

impl Plan {
    fn next(&mut self, request: &Request<Incoming>) -> Option<Fault> {
        let number = self.asked.len();
        self.asked.push(format!("{} {}", request.method(), request.uri()));
        self.fault.filter(|(at, _)| *at == number).map(|(_, fault)| fault)
    }
}

/// A connection that is cut.
#[derive(Debug, thiserror::Error)]
#[error("the connection is lost")]
struct Lost;

async fn answer(client: Client, request: Request<Incoming>, fault: Option<Fault>) -> Result<Answer, Lost> {
    let is_watch = request.uri().query().is_some_and(|query| query.contains("watch=true"));
    let is_write = matches!(*request.method(), Method::PUT | Method::PATCH);
    match fault {
        None => forward(client, request).await,
        Some(Fault::Conflict) if is_write => Ok(refusal(409, "Conflict", None)),
        Some(Fault::TooMany) => Ok(refusal(429, "TooManyRequests", Some("1"))),
        Some(Fault::Expired) if is_watch => {
            let status = json!({ "type": "ERROR", "object": { "kind": "Status", "apiVersion": "v1", "metadata": {},
                "status": "Failure", "message": "too old resource version", "reason": "Expired", "code": 410 } });
            Ok(whole(StatusCode::OK, format!("{status}\n")))
        }
        Some(Fault::Conflict | Fault::Internal | Fault::Expired) => Ok(refusal(500, "InternalError", None)),
        Some(Fault::LostRequest) => Err(Lost),
        Some(Fault::LostAnswer) if is_watch => {
            let answer = forward(client, request).await?;
            let (parts, body) = answer.into_parts();
            let cut = body.into_data_stream().take_until(tokio::time::sleep(Duration::from_millis(300)));
            let cut = cut.map(|chunk| chunk.map(Frame::data));
            Ok(Response::from_parts(parts, StreamBody::new(cut).boxed_unsync()))
        }
        Some(Fault::LostAnswer) => {
            let answer = forward(client, request).await?;
            let _ = answer.into_body().collect().await;
            Err(Lost)
        }
        Some(Fault::Late) => {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.map_err(|_| Lost)?.to_bytes();
            // It goes on though nobody waits for it any more.
            let late = tokio::spawn(async move {
                tokio::time::sleep(LATE).await;
                send(client, parts, body).await
            });
            late.await.map_err(|_| Lost)?
        }
    }
}

async fn forward(client: Client, request: Request<Incoming>) -> Result<Answer, Lost> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Lost)?.to_bytes();
    send(client, parts, body).await
}

async fn send(client: Client, parts: http::request::Parts, body: Bytes) -> Result<Answer, Lost> {
    let mut request = Request::builder().method(parts.method).uri(parts.uri.path_and_query().unwrap().as_str());
    for name in ["accept", "content-type"] {
        if let Some(value) = parts.headers.get(name) {
            request = request.header(name, value);
        }
    }
    let answer = client.send(request.body(Body::from(body)).unwrap()).await.map_err(|_| Lost)?;
    let (parts, body) = answer.into_parts();
    let mut headers = HeaderMap::new();
    for name in ["content-type", "retry-after"] {
        if let Some(value) = parts.headers.get(name) {
            headers.insert(name, value.clone());
        }
    }
    let body = body.map_err(std::io::Error::other).boxed_unsync();
    let mut answer = Response::new(body);
    *answer.status_mut() = parts.status;
    *answer.headers_mut() = headers;
    Ok(answer)
}

fn refusal(code: u16, reason: &str, retry_after: Option<&str>) -> Answer {
    let status = json!({ "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "injected", "reason": reason, "code": code });
    let mut answer = whole(StatusCode::from_u16(code).unwrap(), status.to_string());
    if let Some(seconds) = retry_after {
        answer.headers_mut().insert("retry-after", seconds.parse().unwrap());
    }
    answer
}

fn whole(status: StatusCode, text: String) -> Answer {
    let body = Full::new(Bytes::from(text)).map_err(|never: Infallible| match never {}).boxed_unsync();
    let mut answer = Response::new(body);
    *answer.status_mut() = status;
    answer.headers_mut().insert("content-type", "application/json".parse().unwrap());
    answer
}
