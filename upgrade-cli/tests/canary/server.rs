//! A server that tells everybody what it was told.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};

/// Starts it; returns its port. It ends with the process.
pub(crate) fn start() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || listener.incoming().flatten().for_each(|stream| drop(answer(stream))));
    port
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut told = String::new();
    for line in BufReader::new(&stream).lines() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if let Some(token) = line.to_lowercase().starts_with("x-token:").then(|| line[8..].trim().to_owned()) {
            told = token;
        }
    }
    let quoted = format!("{{\"token\":\"{told}\",\"version\":\"{told}\"}}");
    write!(
        stream,
        "HTTP/1.1 500 {told}\r\nX-Echo: {told}\r\nLocation: /{told}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{quoted}",
        quoted.len()
    )
}
