//! Authorities and what they sign, for connections with TLS.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const CONFIGURATION: &str = "
[req]
distinguished_name = name
x509_extensions = authority
prompt = no
[name]
[authority]
basicConstraints = critical, CA:true
keyUsage = critical, keyCertSign
[engine]
subjectAltName = IP:127.0.0.1
extendedKeyUsage = serverAuth
[client]
extendedKeyUsage = clientAuth
";

/// What a certificate is for.
#[derive(Clone, Copy, Debug)]
pub enum Holder {
    /// An engine at 127.0.0.1.
    Engine,
    /// Who reaches one.
    Client,
}

/// Signs certificates.
#[derive(Clone, Debug)]
pub struct Authority {
    directory: PathBuf,
}

impl Authority {
    /// Makes an authority, its key and certificate in a directory.
    ///
    /// # Panics
    /// There is no `openssl`.
    pub fn create(directory: &Path) -> Self {
        let authority = Self::of(directory);
        std::fs::create_dir_all(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
        std::fs::write(authority.path("openssl.cnf"), CONFIGURATION).expect("a file of ours can be written");
        authority.openssl(&["req", "-x509", "-subj", "/CN=authority", "-days", "2", "-config"], |more| {
            more.args(NEW_KEY)
                .arg("-keyout")
                .arg(authority.path("ca-key.pem"))
                .arg("-out")
                .arg(authority.path("ca.pem"));
        });
        authority
    }

    /// The one that was made in a directory.
    pub(super) fn of(directory: &Path) -> Self {
        Self { directory: directory.to_owned() }
    }

    /// Its certificate.
    pub fn certificate(&self) -> PathBuf {
        self.path("ca.pem")
    }

    /// Puts `ca.pem`, `cert.pem` and `key.pem` into a directory; valid for `days`, which may have gone by.
    ///
    /// # Panics
    /// As [`Authority::create`].
    pub fn sign(&self, holder: Holder, days: i32, into: &Path) {
        std::fs::create_dir_all(into).unwrap_or_else(|error| panic!("{}: {error}", into.display()));
        let section = match holder {
            Holder::Engine => "engine",
            Holder::Client => "client",
        };
        let (request, key, certificate) = (into.join("request"), into.join("key.pem"), into.join("cert.pem"));
        self.openssl(&["req", "-subj", "/CN=holder", "-config"], |more| {
            more.args(NEW_KEY).arg("-keyout").arg(&key).arg("-out").arg(&request);
        });
        self.openssl(&["x509", "-req", "-CAcreateserial", "-extensions", section, "-extfile"], |more| {
            more.args(["-days", &days.to_string(), "-CA"]).arg(self.certificate());
            more.arg("-CAkey").arg(self.path("ca-key.pem")).arg("-in").arg(&request).arg("-out").arg(&certificate);
        });
        std::fs::copy(self.certificate(), into.join("ca.pem")).expect("a file of ours can be copied");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn openssl(&self, arguments: &[&str], more: impl FnOnce(&mut Command)) {
        let mut command = Command::new("openssl");
        command.args(arguments).arg(self.path("openssl.cnf")).stdin(Stdio::null());
        more(&mut command);
        let done =
            command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; on Debian: apt-get install openssl"));
        assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    }
}

const NEW_KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
