//! Found contents in the journal's database: encrypted, or not at all.

use std::sync::Arc;

use async_trait::async_trait;
use upgrade_core::error::StepError;
use upgrade_core::journal::JournalError;
use upgrade_core::journal::cipher::Cipher;
use upgrade_core::names::RunId;
use upgrade_core::sealed::{SealedRef, SealedStorage};

use super::clerk::Clerk;
use super::failure::server;

/// Says how a key is made and given.
pub(super) const KEY_HINT: &str = "set UPGRADE_SEAL_KEY to 64 hexadecimal digits, the same on every machine that drives \
    runs of this journal: `openssl rand -hex 32` makes one";

pub(super) struct PostgresSealed {
    clerk: Arc<Clerk>,
    cipher: Option<Arc<Cipher>>,
    run: RunId,
}

impl PostgresSealed {
    pub(super) fn new(clerk: Arc<Clerk>, cipher: Option<Arc<Cipher>>, run: RunId) -> Self {
        Self { clerk, cipher, run }
    }

    fn cipher(&self) -> Result<&Cipher, StepError> {
        // A database is read, dumped and copied by more people than a directory of mode 0700.
        self.cipher.as_deref().ok_or_else(|| {
            StepError::permanent(
                "contents that may be secret are kept in a database encrypted only, and there is no key",
            )
            .with_hint(KEY_HINT)
        })
    }

    /// Runs one statement on the journal's own threads.
    async fn run<T: Send + 'static, F>(
        &self,
        what: &'static str,
        work: impl FnOnce(Arc<Clerk>, RunId) -> F,
    ) -> Result<T, StepError>
    where
        F: Future<Output = Result<T, JournalError>> + Send + 'static,
    {
        self.clerk.run(work(self.clerk.clone(), self.run.clone())).await.map_err(|error| {
            StepError::unknown(what)
                .with_cause(&error)
                .with_hint("look at the journal's server: whether it takes writes")
        })
    }
}

#[async_trait]
impl SealedStorage for PostgresSealed {
    async fn put(&self, contents: &[u8]) -> Result<SealedRef, StepError> {
        let reference = SealedRef::of(contents);
        let sealed = self
            .cipher()?
            .seal(&reference.sha256, contents)
            .map_err(|error| StepError::unknown("the contents found cannot be encrypted").with_cause(&error))?;
        let digest = reference.sha256.clone();
        self.run("the contents found cannot be kept", |clerk, run| async move {
            let mut session = clerk.session().await?;
            sqlx::query(
                "INSERT INTO sealed (run, digest, contents) VALUES ($1, $2, $3)
                 ON CONFLICT (run, digest) DO UPDATE SET contents = excluded.contents",
            )
            .bind(run.as_str())
            .bind(digest)
            .bind(sealed)
            .execute(&mut *session)
            .await
            .map_err(server("keeping found contents"))?;
            clerk.keep(session);
            Ok(())
        })
        .await?;
        Ok(reference)
    }

    async fn get(&self, reference: &SealedRef) -> Result<Vec<u8>, StepError> {
        let digest = reference.sha256.clone();
        let found: Option<Vec<u8>> = self
            .run("the contents found before cannot be read", |clerk, run| async move {
                let mut session = clerk.session().await?;
                let found = sqlx::query_scalar("SELECT contents FROM sealed WHERE run = $1 AND digest = $2")
                    .bind(run.as_str())
                    .bind(digest)
                    .fetch_optional(&mut *session)
                    .await
                    .map_err(server("reading found contents"))?;
                clerk.keep(session);
                Ok(found)
            })
            .await?;
        let sealed = found.ok_or_else(|| {
            StepError::permanent(format!("the sealed contents {} are not in the journal", reference.sha256))
                .with_hint("put the contents back by hand and resolve with --skip")
        })?;
        let contents = self.cipher()?.open(&reference.sha256, &sealed).map_err(|error| {
            StepError::permanent(format!("the sealed contents {} cannot be decrypted", reference.sha256))
                .with_cause(&error)
                .with_hint("set UPGRADE_SEAL_KEY to the key that the run was started with")
        })?;
        if SealedRef::of(&contents) != *reference {
            return Err(StepError::permanent(format!("the sealed contents {} are damaged", reference.sha256))
                .with_hint("put the contents back by hand and resolve with --skip"));
        }
        Ok(contents)
    }

    async fn clear(&self) -> Result<(), StepError> {
        self.run("the contents found before cannot be removed", |clerk, run| async move {
            let mut session = clerk.session().await?;
            sqlx::query("DELETE FROM sealed WHERE run = $1")
                .bind(run.as_str())
                .execute(&mut *session)
                .await
                .map_err(server("removing found contents"))?;
            clerk.keep(session);
            Ok(())
        })
        .await
    }
}
