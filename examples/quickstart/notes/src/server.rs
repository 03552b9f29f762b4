//! The service itself.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::daemon::PidFile;
use crate::store::{Store, quoted};
use crate::{Config, Release};

const LONGEST_NOTE: usize = 64 * 1024;

struct Service {
    version: &'static str,
    health: Result<(), String>,
    store: Mutex<Box<dyn Store>>,
}

/// Serves for as long as the pid file names this process.
pub(crate) fn serve(release: &Release, config_path: &Path) -> Result<String, String> {
    let config = Config::read(config_path)?;
    let settings = (release.settings)(&config, config_path.parent().unwrap_or(Path::new("")))?;
    let service = Arc::new(Service {
        version: release.version,
        health: (release.health)(&config),
        store: Mutex::new(settings.store),
    });
    let listener = bind(settings.listen).map_err(|e| format!("{}: {e}", settings.listen))?;
    let pid_file = PidFile::of(config_path);
    pid_file.claim()?;
    for _ in 0..settings.workers {
        let listener = listener.try_clone().map_err(|e| e.to_string())?;
        let service = service.clone();
        std::thread::spawn(move || work(&listener, &service));
    }
    println!("notes {} listens on {}", release.version, settings.listen);
    if let Err(why) = &service.health {
        eprintln!("notes {} is not healthy: {why}", release.version);
    }
    while pid_file.is_ours() {
        std::thread::sleep(Duration::from_millis(20));
    }
    // Held to the end of the process: no note is half accepted.
    let _quiet = service.store.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(format!("notes {} stops", release.version))
}

/// Binds the address, and waits for a service that was asked to stop a moment ago.
fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let since = Instant::now();
    loop {
        match TcpListener::bind(address) {
            Err(e) if e.kind() == ErrorKind::AddrInUse && since.elapsed() < Duration::from_secs(1) => {
                std::thread::sleep(Duration::from_millis(20));
            }
            bound => return bound,
        }
    }
}

fn work(listener: &TcpListener, service: &Service) {
    for stream in listener.incoming().flatten() {
        if let Err(why) = answer(&stream, service) {
            eprintln!("a request could not be answered: {why}");
        }
    }
}

fn answer(mut stream: &TcpStream, service: &Service) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let (status, body) = match read_request(stream)? {
        Some((line, body)) => service.respond(&line, &body),
        None => ("400 Bad Request", r#"{"error":"this is not a request that the service reads"}"#.to_owned()),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

/// Reads a request: its method and path, and its body.
fn read_request(stream: &TcpStream) -> std::io::Result<Option<(String, String)>> {
    let mut reader = BufReader::new(stream.take((LONGEST_NOTE * 2) as u64));
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut length = 0;
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? == 0 {
            return Ok(None);
        }
        match header.trim_end().split_once(':') {
            None => break,
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().unwrap_or(usize::MAX);
            }
            Some(_) => {}
        }
    }
    if length > LONGEST_NOTE {
        return Ok(None);
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    let call = line.split(' ').take(2).collect::<Vec<_>>().join(" ");
    Ok(String::from_utf8(body).ok().map(|body| (call, body)))
}

impl Service {
    fn respond(&self, call: &str, body: &str) -> (&'static str, String) {
        match call {
            "GET /health" => match &self.health {
                Ok(()) => ("200 OK", r#"{"healthy":true}"#.to_owned()),
                Err(why) => ("503 Service Unavailable", format!(r#"{{"healthy":false,"why":{}}}"#, quoted(why))),
            },
            "GET /version" => ("200 OK", format!(r#"{{"version":{}}}"#, quoted(self.version))),
            "GET /notes" => match self.store.lock().unwrap_or_else(PoisonError::into_inner).json() {
                Ok(notes) => ("200 OK", notes),
                Err(why) => ("500 Internal Server Error", format!(r#"{{"error":{}}}"#, quoted(&why))),
            },
            "POST /notes" => match self.store.lock().unwrap_or_else(PoisonError::into_inner).add(body) {
                Ok(()) => ("201 Created", "{}".to_owned()),
                Err(why) => ("500 Internal Server Error", format!(r#"{{"error":{}}}"#, quoted(&why))),
            },
            _ => ("404 Not Found", r#"{"error":"there is nothing here"}"#.to_owned()),
        }
    }
}
