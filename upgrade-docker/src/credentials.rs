//! Who may pull from and push to a registry.

use bollard::auth::DockerCredentials;
use docker_credential::{CredentialRetrievalError, DockerCredential};
use secrecy::{ExposeSecret, SecretString};
use upgrade_core::context::{Context, blocking};
use upgrade_core::error::StepError;

use crate::target::Engine;

/// Docker Hub under the name that `docker login` files it by.
const HUB: &str = "https://index.docker.io/v1/";

impl Engine {
    /// Returns who pulls from a registry: as the target says, else as Docker's own configuration
    /// and its credential helpers do; none if neither knows the registry.
    ///
    /// What it returns is masked in all that the run writes.
    ///
    /// # Errors
    /// A secret cannot be resolved, or a credential helper fails.
    pub async fn credentials(&self, cx: &Context, registry: &str) -> Result<Option<DockerCredentials>, StepError> {
        let address = if registry == "docker.io" { HUB } else { registry };
        if let Some(login) = self.registries().get(registry) {
            let password = cx.secret(&login.password).await?;
            return Ok(Some(DockerCredentials {
                username: Some(login.username.clone()),
                password: Some(password.expose_secret().to_owned()),
                serveraddress: Some(address.to_owned()),
                ..DockerCredentials::default()
            }));
        }
        let asked = address.to_owned();
        // A credential helper is a program that may take its time.
        let found = blocking(move || Ok(docker_credential::get_credential(&asked))).await?;
        let mut credentials =
            DockerCredentials { serveraddress: Some(address.to_owned()), ..DockerCredentials::default() };
        match found {
            Ok(DockerCredential::UsernamePassword(username, password)) => {
                cx.remember_secret(&SecretString::from(password.clone()));
                credentials.username = Some(username);
                credentials.password = Some(password);
            }
            Ok(DockerCredential::IdentityToken(token)) => {
                cx.remember_secret(&SecretString::from(token.clone()));
                credentials.identitytoken = Some(token);
            }
            Err(CredentialRetrievalError::ConfigNotFound)
            | Err(CredentialRetrievalError::ConfigReadError)
            | Err(CredentialRetrievalError::NoCredentialConfigured) => return Ok(None),
            Err(error) => {
                return Err(StepError::permanent(format!("the credentials for registry {registry} cannot be read"))
                    .with_cause(&error)
                    .with_hint(format!(
                        "mend Docker's configuration (`docker login {registry}`), or name them on the target: \
                         `registries: {{ \"{registry}\": {{ username: …, password: {{ env: … }} }} }}`"
                    )));
            }
        }
        Ok(Some(credentials))
    }
}
