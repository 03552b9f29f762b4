//! A client of the service, so that a machine needs no other.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// Sends a request and returns the body of the answer.
///
/// # Errors
/// Nobody answers, or not with success.
pub(crate) fn request(method: &str, url: &str, body: &str) -> Result<String, String> {
    let rest = url.strip_prefix("http://").ok_or("the URL must start with http://")?;
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let answer = exchange(method, host, path, body).map_err(|e| format!("{url}: {e}"))?;
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(|| format!("{url}: the answer is not HTTP"))?;
    let status = head.split(' ').nth(1).unwrap_or_default();
    if status.starts_with('2') { Ok(body.to_owned()) } else { Err(format!("{url}: {status} {body}")) }
}

fn exchange(method: &str, host: &str, path: &str, body: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(host)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    write!(
        stream,
        "{method} /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}
