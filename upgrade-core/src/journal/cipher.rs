//! Encryption of sealed contents.

use std::fmt;
use std::io;

use chacha20poly1305::aead::{Aead, Generate, Payload};
use chacha20poly1305::{ChaCha20Poly1305, KeyInit, Nonce};

/// Names the layout that follows: a nonce of 12 bytes, then the encrypted contents.
const MAGIC: &[u8] = b"upgrade-sealed-1\n";
const NONCE: usize = 12;

/// Encrypts with ChaCha20-Poly1305, with a random nonce each time.
pub struct Cipher {
    cipher: ChaCha20Poly1305,
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher")
    }
}

impl Cipher {
    /// Makes a cipher from a key of 32 bytes in hexadecimal.
    ///
    /// # Errors
    /// The key is not 64 hexadecimal digits.
    pub fn from_hex(key: &str) -> Result<Self, io::Error> {
        // The message never holds the key.
        let invalid = || io::Error::new(io::ErrorKind::InvalidInput, "the key is not 64 hexadecimal digits");
        let key = key.trim();
        if key.len() != 64 || !key.is_ascii() {
            return Err(invalid());
        }
        let mut bytes = [0; 32];
        for (place, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&key[2 * place..2 * place + 2], 16).map_err(|_| invalid())?;
        }
        Ok(Self { cipher: ChaCha20Poly1305::new(&bytes.into()) })
    }

    /// Encrypts contents under their digest, so that none can stand in for another.
    ///
    /// # Errors
    /// The system has no random numbers to give.
    pub fn seal(&self, digest: &str, contents: &[u8]) -> Result<Vec<u8>, io::Error> {
        let nonce = Nonce::try_generate().map_err(io::Error::other)?;
        let sealed = self
            .cipher
            .encrypt(&nonce, Payload { msg: contents, aad: digest.as_bytes() })
            .map_err(|_| io::Error::other("encryption failed"))?;
        Ok([MAGIC, nonce.as_slice(), &sealed].concat())
    }

    /// Decrypts what `seal` made.
    ///
    /// # Errors
    /// The key is another one, or the contents were changed.
    pub fn open(&self, digest: &str, sealed: &[u8]) -> Result<Vec<u8>, io::Error> {
        let (nonce, sealed) = sealed
            .strip_prefix(MAGIC)
            .and_then(|rest| rest.split_at_checked(NONCE))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "they are not sealed contents"))?;
        let nonce = Nonce::try_from(nonce).map_err(|_| io::Error::other("the nonce has another length"))?;
        self.cipher
            .decrypt(&nonce, Payload { msg: sealed, aad: digest.as_bytes() })
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "another key, or the contents were changed"))
    }
}
