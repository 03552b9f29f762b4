//! The text that tells a proxy where the traffic goes.

use minijinja::{AutoEscape, Environment, UndefinedBehavior, context, syntax::SyntaxConfig};

/// Stands for an address while it is looked where a template writes one.
const ANYWHERE: &str = "\u{e000}";

/// Holds a template with the places `address`, `port` and `name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Template {
    text: String,
}

/// Says where a container is reached.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) address: &'a str,
    pub(super) port: u16,
    pub(super) name: &'a str,
}

impl Template {
    pub(super) fn new(text: String) -> Self {
        Self { text }
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Refuses a template that cannot be rendered, or that leads everybody to the same place.
    pub(super) fn validate(&self) -> Result<(), String> {
        let one = self.render(Place { address: "192.0.2.1", port: 80, name: "one" })?;
        let other = self.render(Place { address: "192.0.2.2", port: 80, name: "other" })?;
        if one == other {
            return Err("the template holds neither {{ address }} nor {{ name }}".into());
        }
        Ok(())
    }

    /// Renders the template; what is wrong is said without quoting it.
    pub(super) fn render(&self, place: Place<'_>) -> Result<String, String> {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_debug(false);
        let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
        environment.set_syntax(syntax.map_err(|error| format!("the template language cannot be set up: {error}"))?);
        let names = context! { address => place.address, port => place.port, name => place.name };
        environment.render_str(&self.text, names).map_err(|error| {
            let line = error.line().map(|line| format!(", line {line}")).unwrap_or_default();
            format!("the template{line}: {}", error.kind())
        })
    }

    /// Tells whether a text is what the template writes for this container at any address.
    ///
    /// The address of a container that was started again may have changed since it was written.
    pub(super) fn wrote(&self, text: &str, port: u16, name: &str) -> bool {
        let Ok(pattern) = self.render(Place { address: ANYWHERE, port, name }) else { return false };
        let Some((before, _)) = pattern.split_once(ANYWHERE) else { return pattern == text };
        let Some(rest) = text.strip_prefix(before) else { return false };
        let end = rest.find(|c: char| !(c.is_ascii_hexdigit() || c == '.' || c == ':')).unwrap_or(rest.len());
        // What follows may look like a part of the address: `:8080`.
        (1..=end).any(|length| {
            let address = &rest[..length];
            address.parse::<std::net::IpAddr>().is_ok()
                && self.render(Place { address, port, name }).is_ok_and(|written| written == text)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NGINX: &str = "upstream web {\n  server {{ address }}:{{ port }}; # {{ name }}\n}\n";

    #[test]
    fn what_it_wrote_is_known_again_whatever_the_address() {
        let template = Template::new(NGINX.into());
        template.validate().unwrap();
        for address in ["10.0.0.7", "172.16.255.254", "fd00::7"] {
            let text = template.render(Place { address, port: 8080, name: "web-blue" }).unwrap();
            assert!(text.ends_with("}\n"));
            assert!(template.wrote(&text, 8080, "web-blue"), "{text}");
            assert!(!template.wrote(&text, 8080, "web-green"));
            assert!(!template.wrote(&text, 80, "web-blue"));
            assert!(!template.wrote(&format!("{text}# mine"), 8080, "web-blue"));
        }
        let twice = Template::new("{{ address }} {{ address }}".into());
        assert!(twice.wrote("10.0.0.1 10.0.0.1", 1, "x") && !twice.wrote("10.0.0.1 10.0.0.2", 1, "x"));
        let by_name = Template::new("http://{{ name }}:{{ port }}".into());
        assert!(by_name.wrote("http://web-blue:80", 80, "web-blue") && !by_name.wrote("http://web:80", 80, "web-blue"));
    }

    #[test]
    fn one_that_leads_nowhere_is_refused() {
        for (text, why) in
            [("server web:80;", "neither"), ("{{ addres }}", "undefined"), ("{{ address", "line 1"), ("", "neither")]
        {
            let error = Template::new(text.into()).validate().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
