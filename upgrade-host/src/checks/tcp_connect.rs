//! `tcp.connect`: connects to a port, says something if asked to, and reads the answer.

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};
use upgrade_core::check::Check;
use upgrade_core::context::Context;
use upgrade_core::error::CheckError;
use upgrade_core::registry::{BuildContext, BuildError};
use upgrade_core::secret::ExposeSecret;
use upgrade_core::units::Span;
use upgrade_core::verdict::Verdict;

use upgrade_core::text_or_secret::TextOrSecret;

/// How much of an answer is read.
const MOST: usize = 64 << 10;

/// Configures `tcp.connect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TcpConnectCheckConfig {
    /// The host's name or address.
    #[serde(default = "host")]
    pub host: String,
    /// The port.
    pub port: u16,
    /// How long connecting and answering may take together.
    #[serde(default = "longest")]
    pub timeout: Span,
    /// What to send once connected; `\r`, `\n`, `\t`, `\0`, `\\` and `\x41` are understood.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send: Option<TextOrSecret>,
    /// A text that must come back, written likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect: Option<String>,
}

fn host() -> String {
    "127.0.0.1".to_owned()
}

fn longest() -> Span {
    Span::from_secs(5)
}

impl TcpConnectCheckConfig {
    /// Connects to a port, no more.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self { host: host.into(), port, timeout: longest(), send: None, expect: None }
    }
}

/// Connects to a port, says something if asked to, and reads the answer.
#[derive(Debug)]
pub struct TcpConnectCheck {
    config: TcpConnectCheckConfig,
    expect: Option<Vec<u8>>,
}

enum Talk {
    Answered,
    Refused(io::Error),
    Broken(io::Error),
    Unexpected(Vec<u8>),
}

impl TcpConnectCheck {
    /// Makes the check from its configuration.
    ///
    /// # Errors
    /// `send` or `expect` holds a backslash that starts nothing known.
    pub fn from_config(config: TcpConnectCheckConfig, _cx: &BuildContext) -> Result<Self, BuildError> {
        let wrong = |key: &'static str| {
            move |why: String| BuildError::new(why).at(key).with_hint(r"write `\\` for a backslash")
        };
        if let Some(TextOrSecret::Text(text)) = &config.send {
            unescape(text).map_err(wrong("send"))?;
        }
        let expect = config.expect.as_deref().map(unescape).transpose().map_err(wrong("expect"))?;
        Ok(Self { config, expect })
    }

    async fn talk(&self, send: Option<&[u8]>) -> Talk {
        let mut stream = match TcpStream::connect((self.config.host.as_str(), self.config.port)).await {
            Ok(stream) => stream,
            Err(error) => return Talk::Refused(error),
        };
        if let Some(send) = send
            && let Err(error) = stream.write_all(send).await
        {
            return Talk::Broken(error);
        }
        let Some(expect) = &self.expect else { return Talk::Answered };
        let mut answer = Vec::new();
        let mut buffer = [0; 4096];
        while answer.len() < MOST {
            match stream.read(&mut buffer).await {
                Ok(0) => break,
                Ok(read) => answer.extend_from_slice(&buffer[..read]),
                Err(error) => return Talk::Broken(error),
            }
            if expect.is_empty() || answer.windows(expect.len()).any(|part| part == expect) {
                return Talk::Answered;
            }
        }
        Talk::Unexpected(answer)
    }
}

/// Reads the escapes of a text.
fn unescape(text: &str) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(char) = rest.next() {
        if char != '\\' {
            bytes.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes());
            continue;
        }
        bytes.push(match rest.next() {
            Some('r') => b'\r',
            Some('n') => b'\n',
            Some('t') => b'\t',
            Some('0') => 0,
            Some('\\') => b'\\',
            Some('x') => {
                let digits: String = rest.by_ref().take(2).collect();
                let byte = u8::from_str_radix(&digits, 16).ok();
                byte.filter(|_| digits.chars().all(|c| c.is_ascii_hexdigit()) && digits.len() == 2)
                    .ok_or_else(|| format!(r"`\x{digits}` is not a byte"))?
            }
            Some(other) => return Err(format!(r"`\{other}` means nothing")),
            None => return Err("a backslash ends the text".to_owned()),
        });
    }
    Ok(bytes)
}

#[async_trait]
impl Check for TcpConnectCheck {
    async fn check(&self, cx: &Context) -> Result<Verdict, CheckError> {
        let TcpConnectCheckConfig { host, port, timeout: longest, .. } = &self.config;
        let place = format!("{host}:{port}");
        let send = match &self.config.send {
            // A secret is sent as it is: it was not written with escapes in mind.
            Some(secret @ TextOrSecret::Secret(_)) => {
                Some(secret.resolve(cx).await?.expose_secret().as_bytes().to_vec())
            }
            Some(TextOrSecret::Text(text)) => unescape(text).ok(),
            None => None,
        };
        let begun = Instant::now();
        let talk = tokio::select! {
            () = cx.cancelled().cancelled() => return Err(CheckError::unknown("the check was cancelled")),
            talk = timeout(longest.0, self.talk(send.as_deref())) => talk,
        };
        let latency = begun.elapsed().as_secs_f64() * 1000.0;
        let listens = "see whether the service runs and on which address it listens (`ss -ltn`)";
        Ok(match talk {
            Ok(Talk::Answered) => Verdict::pass(format!("{place} answers in {latency:.1} ms")),
            Ok(Talk::Refused(error)) if is_refusal(&error) => {
                return Ok(Verdict::fail(format!("{place}: {error}")).with_hint(listens));
            }
            Ok(Talk::Refused(error)) => {
                return Err(CheckError::transient(format!("{place} cannot be reached"))
                    .with_cause(&error)
                    .with_hint("check the name and the route from this machine"));
            }
            Ok(Talk::Broken(error)) => Verdict::fail(format!("{place} broke off: {error}")).with_hint(listens),
            Ok(Talk::Unexpected(answer)) => {
                let expected = self.config.expect.as_deref().unwrap_or_default().escape_debug().to_string();
                let found: String = String::from_utf8_lossy(&answer).chars().take(200).collect();
                let found = cx.mask(&found).escape_debug().to_string();
                Verdict::fail(format!("{place} answered `{found}`, expected `{expected}`"))
                    .with_hint("another service may listen there, or this one is not ready")
            }
            Err(_) => return Ok(Verdict::unknown(format!("{place}: no answer within {longest}")).with_hint(listens)),
        }
        .with_measurement("latency_ms", latency))
    }

    fn kind(&self) -> &str {
        "tcp.connect"
    }

    fn definition(&self) -> Value {
        serde_json::to_value(&self.config).unwrap_or_default()
    }
}

fn is_refusal(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionRefused | ConnectionReset | ConnectionAborted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_read_or_refused() {
        assert_eq!(unescape(r"PING\r\n\x00\\é").unwrap(), "PING\r\n\0\\é".as_bytes());
        for wrong in [r"\q", r"\x4", r"\xzz", "\\"] {
            assert!(unescape(wrong).is_err(), "{wrong}");
        }
    }
}
