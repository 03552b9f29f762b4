//! The switch by a proxy: a real nginx with traffic, and one whose commands fail.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{MissedTickBehavior, interval, timeout};
use upgrade_core::error::Class;
use upgrade_core::step::{Rollback as _, Step as _};
use upgrade_core::testkit::TestContext;

use super::{step, undo};
use crate::world::Corner;

const TEMPLATE: &str = "upstream web { server {{ address }}:{{ port }}; }\n";

/// Starts a service `web` of version 1.0.
fn service(corner: &Corner) -> String {
    let image = corner.web("1.0");
    corner.engine.docker(["run", "--detach", "--name", &corner.name("web"), &image]);
    corner.address("web")
}

/// Runs an nginx that leads to the upstream `web`; ended on drop.
struct Nginx {
    directory: PathBuf,
    port: u16,
    master: Child,
}

impl Nginx {
    fn start(corner: &Corner, address: &str) -> Option<Self> {
        let program = ["/usr/sbin/nginx", "/usr/bin/nginx", "/usr/local/sbin/nginx"];
        if !program.iter().any(|path| std::path::Path::new(path).is_file()) {
            assert!(std::env::var("CI").as_deref() != Ok("true"), "promised under CI, but there is no nginx");
            eprintln!("skipped: there is no nginx; on Debian: apt-get install nginx-light");
            return None;
        }
        let directory = corner.directory();
        fs::create_dir_all(directory.join("conf.d")).unwrap();
        fs::write(
            directory.join("conf.d/web.conf"),
            TEMPLATE.replace("{{ address }}:{{ port }}", &format!("{address}:8080")),
        )
        .unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .iter()
            .map(|kind| format!("{kind}_temp_path temp-{kind};\n"))
            .collect();
        let config = format!(
            "user root; daemon off; worker_processes 2; pid pid; error_log error.log warn;\n\
             events {{ worker_connections 1024; }}\n\
             http {{ access_log off; {temporary} include conf.d/*.conf;\n\
             server {{ listen 127.0.0.1:{port} backlog=1024; location / {{ proxy_pass http://web; }} }} }}\n"
        );
        fs::write(directory.join("nginx.conf"), config).unwrap();
        let mut command = Command::new("nginx");
        command.args(["-p"]).arg(&directory).args(["-c", "nginx.conf"]).env("PATH", path());
        let master = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let nginx = Self { directory, port, master };
        for _ in 0..100 {
            if nginx.directory.join("pid").exists() && std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return Some(nginx);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("nginx does not start: {:?}", fs::read_to_string(nginx.directory.join("error.log")));
    }

    fn file(&self) -> PathBuf {
        self.directory.join("conf.d/web.conf")
    }

    fn switch(&self, template: &str) -> Value {
        let nginx = |more: &[&str]| {
            let mut argv = vec!["/usr/sbin/nginx", "-p", self.directory.to_str().unwrap(), "-c", "nginx.conf"];
            argv.extend(more);
            json!(argv)
        };
        json!({ "proxy": { "file": self.file(), "template": template, "port": 8080,
                           "check": nginx(&["-t"]), "reload": nginx(&["-s", "reload"]) } })
    }

    /// Which version answers.
    async fn version(&self) -> String {
        request(self.port).await.unwrap()
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        // The master ends its workers only if it is asked to.
        let _ = Command::new("kill").args(["-TERM", &self.master.id().to_string()]).status();
        let _ = self.master.wait();
    }
}

fn path() -> String {
    format!("{}:/usr/sbin", std::env::var("PATH").unwrap_or_default())
}

/// Asks for the version, as a client that keeps no connection.
async fn request(port: u16) -> Result<String, String> {
    let asked = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.write_all(b"GET /version HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n").await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer)
    };
    let answer = timeout(Duration::from_secs(10), asked).await.map_err(|_| "no answer".to_owned())?;
    let answer = answer.map_err(|error| error.to_string())?;
    match answer.split_once("\r\n\r\n") {
        Some((head, body)) if head.starts_with("HTTP/1.1 200") && !body.is_empty() => Ok(body.trim().to_owned()),
        _ => Err(answer),
    }
}

/// Sends requests, 200 a second, until there were as many as asked for.
struct Traffic {
    sent: Arc<AtomicU32>,
    failures: tokio::task::JoinHandle<(Vec<String>, [u32; 2])>,
    over: Arc<AtomicBool>,
}

impl Traffic {
    fn of(port: u16, count: u32) -> Self {
        let (sent, over) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
        let (counter, ended) = (sent.clone(), over.clone());
        let failures = tokio::spawn(async move {
            let mut clock = interval(Duration::from_millis(5));
            clock.set_missed_tick_behavior(MissedTickBehavior::Burst);
            let mut all = tokio::task::JoinSet::new();
            for _ in 0..count {
                clock.tick().await;
                all.spawn(request(port));
                counter.fetch_add(1, Ordering::Relaxed);
            }
            ended.store(true, Ordering::Relaxed);
            let (mut failures, mut by_version) = (Vec::new(), [0, 0]);
            for answer in all.join_all().await {
                match answer.as_deref() {
                    Ok("1.0") => by_version[0] += 1,
                    Ok("2.0") => by_version[1] += 1,
                    other => failures.push(format!("{other:?}")),
                }
            }
            (failures, by_version)
        });
        Self { sent, failures, over }
    }
}

/// Switches and rolls back as long as there is traffic; none of it may fail.
async fn switch_under_traffic(what: &str, requests: u32) {
    let Some(corner) = Corner::shared(what) else { return };
    let address = service(&corner);
    let Some(nginx) = Nginx::start(&corner, &address) else { return };
    let step = step(&corner, &corner.web("2.0"), &nginx.switch(TEMPLATE), &json!({ "drain": "1500ms" }));
    let before = fs::read_to_string(nginx.file()).unwrap();
    let traffic = Traffic::of(nginx.port, requests);
    let mut rounds = 0;
    while !traffic.over.load(Ordering::Relaxed) {
        let test = TestContext::new("web");
        let undo = undo(&step, &test).await;
        step.apply(&test.forward(), &undo).await.unwrap();
        assert_eq!(nginx.version().await, "2.0");
        step.rollback(&test.back(), &undo, None).await.unwrap();
        assert_eq!(nginx.version().await, "1.0");
        assert_eq!(fs::read_to_string(nginx.file()).unwrap(), before);
        rounds += 1;
    }
    let sent = traffic.sent.load(Ordering::Relaxed);
    let (failures, by_version) = traffic.failures.await.unwrap();
    println!("{sent} requests, {rounds} switches and rollbacks, answers by version {by_version:?}");
    assert!(failures.is_empty(), "{} of {sent} requests failed: {:?}", failures.len(), failures.first());
    assert!(by_version[1] > 0, "{by_version:?}");
    assert_eq!(corner.colours(), ["web image:1.0 running"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_fails_while_traffic_is_switched_and_given_back() {
    switch_under_traffic("proxy", 2_000).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a campaign"]
async fn campaign_no_request_of_many_fails() {
    switch_under_traffic("campaign", 10_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_the_proxy_refuses_is_taken_back_at_once() {
    let Some(corner) = Corner::shared("refused") else { return };
    let address = service(&corner);
    let Some(nginx) = Nginx::start(&corner, &address) else { return };
    let switch = nginx.switch("upstream web { server {{ address }}:{{ port }} }\n");
    let step = step(&corner, &corner.web("2.0"), &switch, &json!({}));
    let before = fs::read_to_string(nginx.file()).unwrap();
    let test = TestContext::new("web");
    let undo = undo(&step, &test).await;
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert_eq!(error.class(), Class::Permanent);
    assert!(error.message().contains("-t` exits with 1"), "{error:?}");
    assert!(error.detail().unwrap().contains("unexpected \"}\""), "{error:?}");
    assert_eq!(fs::read_to_string(nginx.file()).unwrap(), before);
    assert_eq!(nginx.version().await, "1.0");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!((nginx.version().await.as_str(), corner.colours().len()), ("1.0", 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_reload_that_failed_the_old_file_is_reloaded() {
    let Some(corner) = Corner::shared("reload") else { return };
    service(&corner);
    let directory = corner.directory();
    fs::create_dir_all(&directory).unwrap();
    let (file, seen) = (directory.join("web.conf"), directory.join("seen"));
    fs::write(&file, "old").unwrap();
    // Reads the file, as a proxy does, and takes only the old one.
    let script =
        format!("cat {0} >>{1}; echo >>{1}; echo no memory >&2; grep -q old {0}", file.display(), seen.display());
    let switch = json!({ "proxy": { "file": file, "template": "new {{ name }}", "port": 8080,
                                    "reload": ["sh", "-c", script] } });
    let step = step(&corner, &corner.web("2.0"), &switch, &json!({}));
    let test = TestContext::new("web");
    let undo = undo(&step, &test).await;
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains("exits with 1") && error.detail().unwrap().contains("no memory"), "{error:?}");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    let colour = corner.name("web-blue");
    assert_eq!(fs::read_to_string(&seen).unwrap(), format!("new {colour}\nold\n"));
    assert_eq!(fs::read_to_string(&file).unwrap(), "old");
    assert_eq!(corner.colours(), ["web image:1.0 running"]);

    // A file that somebody else changed in between is left alone.
    let undo = self::undo(&step, &test).await;
    fs::File::options().append(true).open(&file).unwrap().write_all(b" mine").unwrap();
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.as_conflict().unwrap().subject.ends_with("web.conf"), "{error:?}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "old mine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_in_a_container_is_reloaded_there() {
    let Some(corner) = Corner::shared("inside") else { return };
    service(&corner);
    let (directory, proxy) = (corner.directory(), corner.name("proxy"));
    fs::create_dir_all(&directory).unwrap();
    let volume = format!("{}:/conf", directory.display());
    corner.engine.docker(["run", "--detach", "--name", &proxy, "--volume", &volume, &corner.web("1.0")]);
    fs::write(directory.join("to"), "old").unwrap();
    let template = directory.join("template");
    fs::write(&template, "{{ name }} {{ address }}:{{ port }}").unwrap();
    let switch = json!({ "proxy": { "file": directory.join("to"), "template_file": template, "port": 8080,
        "network": "bridge", "container": proxy, "check": ["test", "-s", "/conf/to"], "reload": ["cp", "/conf/to", "/data/to"] } });
    let step = step(&corner, &corner.web("2.0"), &switch, &json!({}));
    let test = TestContext::new("web");
    let undo = undo(&step, &test).await;
    step.apply(&test.forward(), &undo).await.unwrap();
    let loaded = corner.engine.docker(["exec", &proxy, "cat", "/data/to"]);
    assert!(loaded.starts_with(&format!("{} ", corner.name("web-blue"))) && loaded.ends_with(":8080"), "{loaded}");
    step.rollback(&test.back(), &undo, None).await.unwrap();
    assert_eq!(corner.engine.docker(["exec", &proxy, "cat", "/data/to"]), "old");
    assert_eq!(corner.colours(), ["web image:1.0 running"]);

    // Without the proxy, traffic is not moved on a guess.
    let undo = self::undo(&step, &test).await;
    corner.engine.docker(["kill", &proxy]);
    let error = step.apply(&test.forward(), &undo).await.unwrap_err();
    assert!(error.message().contains("the proxy, does not run"), "{error:?}");
    assert_eq!(fs::read_to_string(directory.join("to")).unwrap(), "old");
}
