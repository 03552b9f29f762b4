//! A registry for images, of one test's own.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::guardian::{END_BY_NUMBER, Guardian};
use crate::home::Home;
use crate::postgres::cluster::{HOST, free_port};

/// Who may use a locked registry.
pub const USER: &str = "puller";
/// The password of [`USER`].
pub const PASSWORD: &str = "secret-of-puller";
/// The same, as `htpasswd -B` writes it.
const HTPASSWD: &str = "$2b$04$3l0vvFBB0LzpEcTri/WtAuJ0cZdHbaUJ1HdGEfBgfFZeOYpRz0IYO";

/// A running registry, ended on drop.
#[derive(Debug)]
pub struct Registry {
    port: u16,
    directory: PathBuf,
    child: Child,
    _guardian: Guardian,
}

impl Registry {
    pub(super) fn start(program: &Path, locked: bool) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let directory = Home::of_this_user().base.join(format!("registry-{}-{number}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        for _ in 0..20 {
            let port = free_port();
            let below = directory.display();
            let mut text = format!(
                "version: 0.1\nlog: {{ level: error }}\nstorage:\n  filesystem: {{ rootdirectory: {below}/images }}\n  \
                 delete: {{ enabled: true }}\nhttp: {{ addr: \"{HOST}:{port}\" }}\n"
            );
            if locked {
                std::fs::write(directory.join("users"), format!("{USER}:{HTPASSWD}\n")).expect("a file of ours");
                text.push_str(&format!("auth:\n  htpasswd: {{ realm: test, path: {below}/users }}\n"));
            }
            let configuration = directory.join("config.yml");
            std::fs::write(&configuration, text).expect("a file of ours can be written");
            let mut child = Command::new(program)
                .arg("serve")
                .arg(&configuration)
                .current_dir(&directory)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
            std::fs::write(directory.join("pid"), child.id().to_string()).expect("a file of ours can be written");
            let guardian = Guardian::over(&directory, END_BY_NUMBER);
            let began = Instant::now();
            while began.elapsed() < Duration::from_secs(20) && matches!(child.try_wait(), Ok(None)) {
                if std::net::TcpStream::connect((HOST, port)).is_ok() {
                    return Self { port, directory, child, _guardian: guardian };
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            let _ = child.kill();
            let _ = child.wait();
            drop(guardian);
            let _ = std::fs::create_dir_all(&directory);
        }
        panic!("the registry did not start; its configuration is in {}", directory.display());
    }

    /// Its host and port, as the first part of an image's name.
    pub fn address(&self) -> String {
        format!("{HOST}:{}", self.port)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}
