//! Where a database is and who connects to it: read from a URL, given to the driver and to programs.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};
use sqlx::postgres::PgConnectOptions;
use upgrade_core::error::StepError;
use url::Url;

/// Holds the parts of a connection URL; its `Debug` shows no password.
#[derive(Clone)]
pub struct Address {
    url: Url,
    password: Option<SecretString>,
    /// What was asked for, where the URL leads to the near end of a tunnel.
    far: Option<Url>,
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Address").field("url", &self.url.as_str()).finish_non_exhaustive()
    }
}

impl Address {
    /// Reads `postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=…`.
    ///
    /// # Errors
    /// It is not such a URL; the message does not repeat it, as it may hold a password.
    pub fn parse(text: &str) -> Result<Self, StepError> {
        let wrong = |message: String| {
            StepError::permanent(message)
                .with_hint("write it as postgres://USER@HOST:PORT/DATABASE; special characters of a password as %XX")
        };
        let mut url =
            Url::parse(text).map_err(|error| wrong(format!("the URL of the database cannot be read: {error}")))?;
        if !matches!(url.scheme(), "postgres" | "postgresql") {
            return Err(wrong(format!(
                "the URL of the database begins with `{}:` and not with `postgres:`",
                url.scheme()
            )));
        }
        let named = url.query_pairs().find(|(name, _)| name == "password").map(|(_, value)| value.into_owned());
        let password = named.or(url.password().map(decoded)).map(SecretString::from);
        // A URL with a host has room for a password; one without has none to remove.
        let _ = url.set_password(None);
        without(&mut url, &["password"]);
        let address = Self { url, password, far: None };
        address
            .options()
            .map(|_| address)
            .map_err(|error| wrong("the URL of the database cannot be used".into()).with_cause(&error))
    }

    /// Gives the password that goes with it, unless it has one.
    #[must_use]
    pub fn or_password(mut self, password: Option<SecretString>) -> Self {
        self.password = self.password.or(password);
        self
    }

    /// Names another database of the same server.
    #[must_use]
    pub fn database(mut self, name: &str) -> Self {
        for url in std::iter::once(&mut self.url).chain(&mut self.far) {
            if let Ok(mut path) = url.path_segments_mut() {
                path.clear().push(name);
            }
            without(url, &["dbname"]);
        }
        self
    }

    /// Returns the password, if it is known.
    pub fn password(&self) -> Option<&SecretString> {
        self.password.as_ref()
    }

    /// Returns the URL, without a password.
    pub fn url(&self) -> &str {
        self.url.as_str()
    }

    /// Returns what the driver connects with.
    ///
    /// # Errors
    /// A parameter has no such value.
    pub fn options(&self) -> Result<PgConnectOptions, sqlx::Error> {
        // No pooler between here and the server has to know the parameter.
        let mut options = self.url.as_str().parse::<PgConnectOptions>()?.extra_float_digits(None);
        if let Some(far) = &self.far {
            // What ~/.pgpass has for the far end is not found under the near one.
            options = far
                .as_str()
                .parse::<PgConnectOptions>()?
                .extra_float_digits(None)
                .host(options.get_host())
                .port(options.get_port());
        }
        Ok(match &self.password {
            Some(password) => options.password(password.expose_secret()),
            None => options,
        })
    }

    /// Returns the host, `localhost` for every spelling of this machine.
    pub fn host(&self) -> String {
        match self.options() {
            Ok(options) if options.get_socket().is_none() => match options.get_host() {
                "127.0.0.1" | "::1" | "[::1]" => "localhost".to_owned(),
                host if host.starts_with('/') => "localhost".to_owned(),
                host => host.to_ascii_lowercase(),
            },
            _ => "localhost".to_owned(),
        }
    }

    /// Tells whether it is a socket in the file system, which leads to no other machine.
    pub fn is_socket(&self) -> bool {
        self.options().is_ok_and(|options| options.get_socket().is_some())
    }

    /// Returns the port.
    pub fn port(&self) -> u16 {
        self.options().map_or(5432, |options| options.get_port())
    }

    /// Returns the name of the database: if the URL names none, that of the user, as the server does.
    pub fn database_name(&self) -> String {
        self.options()
            .map(|options| options.get_database().unwrap_or(options.get_username()).to_owned())
            .unwrap_or_default()
    }

    /// Returns the environment with which PostgreSQL's own programs connect: the password is in no
    /// argument that `ps` shows.
    ///
    /// # Errors
    /// A parameter has no such value.
    pub fn environment(&self) -> Result<Vec<(&'static str, String)>, sqlx::Error> {
        let options = self.options()?;
        let host =
            options.get_socket().map_or_else(|| options.get_host().to_owned(), |path| path.display().to_string());
        let mut environment = Vec::new();
        let host = match &self.far {
            // Through a tunnel, the certificate is still the far end's.
            Some(far) => {
                environment.push(("PGHOSTADDR", host));
                far.as_str().parse::<PgConnectOptions>()?.get_host().to_owned()
            }
            None => host,
        };
        environment.extend([
            ("PGHOST", host),
            ("PGPORT", options.get_port().to_string()),
            ("PGUSER", options.get_username().to_owned()),
            ("PGDATABASE", self.database_name()),
        ]);
        if let Some(password) = &self.password {
            environment.push(("PGPASSWORD", password.expose_secret().to_owned()));
        }
        for (name, value) in self.url.query_pairs() {
            let variable = match &*name {
                "sslmode" | "ssl-mode" => "PGSSLMODE",
                "sslrootcert" | "ssl-root-cert" | "ssl-ca" => "PGSSLROOTCERT",
                "sslcert" | "ssl-cert" => "PGSSLCERT",
                "sslkey" | "ssl-key" => "PGSSLKEY",
                "options" => "PGOPTIONS",
                _ => continue,
            };
            environment.push((variable, value.into_owned()));
        }
        Ok(environment)
    }

    /// Leads the same connection to another place: the near end of a tunnel.
    #[must_use]
    pub(crate) fn through(mut self, address: std::net::SocketAddr) -> Self {
        self.far.get_or_insert_with(|| self.url.clone());
        without(&mut self.url, &["host", "hostaddr", "port"]);
        // Of a URL whose host was read once, host and port can be set again.
        let _ = self.url.set_ip_host(address.ip());
        let _ = self.url.set_port(Some(address.port()));
        self
    }
}

/// Takes parameters out of a URL.
fn without(url: &mut Url, names: &[&str]) {
    if !url.query_pairs().any(|(name, _)| names.contains(&&*name)) {
        return;
    }
    let kept: Vec<_> = url
        .query_pairs()
        .filter(|(name, _)| !names.contains(&&**name))
        .map(|(n, v)| (n.into_owned(), v.into_owned()))
        .collect();
    url.set_query(None);
    if !kept.is_empty() {
        url.query_pairs_mut().extend_pairs(kept);
    }
}

fn decoded(encoded: &str) -> String {
    url::form_urlencoded::parse(format!("p={}", encoded.replace('+', "%2B")).as_bytes())
        .next()
        .map(|(_, value)| value.into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_is_taken_out_and_never_shown() {
        let address = Address::parse("postgres://ann:p%40ss+w%26rd@DB.example/orders?sslmode=require").unwrap();
        assert_eq!(address.password().unwrap().expose_secret(), "p@ss+w&rd");
        assert!(!format!("{address:?}").contains("w%26rd"), "{address:?}");
        assert_eq!(
            (address.host().as_str(), address.port(), address.database_name().as_str()),
            ("db.example", 5432, "orders")
        );
        let environment = address.environment().unwrap();
        assert!(environment.contains(&("PGPASSWORD", "p@ss+w&rd".into())));
        assert!(environment.contains(&("PGSSLMODE", "require".into())));
    }

    #[test]
    fn a_password_among_the_parameters_is_one_too() {
        let address = Address::parse("postgres://ann@db/orders?password=hunter2&sslmode=require").unwrap();
        assert_eq!(address.password().unwrap().expose_secret(), "hunter2");
        assert_eq!(address.url(), "postgres://ann@db/orders?sslmode=require");
    }

    #[test]
    fn through_a_tunnel_the_near_end_is_met_whatever_spelling_the_far_one_has() {
        for text in ["postgres://ann@db:6432/orders?sslmode=require", "postgres:///orders?user=ann&host=db&port=6432"] {
            let near = Address::parse(text).unwrap().through("127.0.0.1:4711".parse().unwrap());
            let options = near.options().unwrap();
            assert_eq!(
                (options.get_host(), options.get_port(), options.get_database()),
                ("127.0.0.1", 4711, Some("orders"))
            );
            let environment = near.environment().unwrap();
            // libpq then asks for the certificate of the far end.
            assert!(environment.contains(&("PGHOST", "db".into())), "{environment:?}");
            assert!(environment.contains(&("PGHOSTADDR", "127.0.0.1".into())), "{environment:?}");
        }
    }

    #[test]
    fn this_machine_has_one_spelling() {
        for text in [
            "postgres://a@localhost/b",
            "postgres://a@127.0.0.1/b",
            "postgres://a@[::1]/b",
            "postgres://a@%2Frun%2Fpostgresql/b",
            "postgres:///b?host=/run/postgresql",
        ] {
            assert_eq!(Address::parse(text).unwrap().host(), "localhost", "{text}");
        }
    }

    #[test]
    fn what_is_no_url_is_refused_without_repeating_it() {
        for text in [
            "hunter2",
            "mysql://a:hunter2@b/c",
            "postgres://a:hunter2@b:port/c",
            "postgres://a:hunter2@b/c?sslmode=perhaps",
        ] {
            let error = Address::parse(text).unwrap_err();
            assert!(!format!("{error} {:?} {:?}", error.causes(), error.hint()).contains("hunter2"), "{error:?}");
        }
    }

    #[test]
    fn another_database_of_the_same_server_keeps_the_rest() {
        for text in ["postgres://ann:pw@db:6432/orders?sslmode=disable", "postgres://ann:pw@db:6432/?dbname=orders"] {
            assert_eq!(Address::parse(text).unwrap().database("a b/c").database_name(), "a b/c");
        }
        let address = Address::parse("postgres://ann:pw@db:6432/orders?sslmode=disable").unwrap().database("a b/c");
        assert_eq!((address.host().as_str(), address.port()), ("db", 6432));
        assert_eq!(address.password().unwrap().expose_secret(), "pw");
    }
}
