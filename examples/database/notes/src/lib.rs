//! Notes in PostgreSQL, for the service of the quickstart.

use notes::Store;
use sqlx::{Connection, PgConnection};
use tokio::runtime::{Builder, Runtime};

/// Keeps notes in the database that `DATABASE_URL` names; each release with statements of its own.
pub struct PostgresStore {
    runtime: Runtime,
    connection: Option<PgConnection>,
    url: String,
    /// Selects all notes as one JSON text.
    select: &'static str,
    /// Inserts the note `$1`.
    insert: &'static str,
}

impl PostgresStore {
    /// Connects to the database, so that a service that cannot reach it does not start.
    ///
    /// # Errors
    /// `DATABASE_URL` is not set, or the database does not answer the release's question.
    pub fn open(select: &'static str, insert: &'static str) -> Result<Self, String> {
        let url = std::env::var("DATABASE_URL").map_err(|_| "DATABASE_URL is not set".to_owned())?;
        let runtime = Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
        let mut store = Self { runtime, connection: None, url, select, insert };
        store.json()?;
        Ok(store)
    }

    /// Runs one statement; connects anew where the last connection broke.
    fn ask<T>(&mut self, work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>) -> Result<T, String> {
        let Self { runtime, connection, url, .. } = self;
        let answer = runtime.block_on(async {
            let kept = match connection.take() {
                Some(mut open) => open.ping().await.is_ok().then_some(open),
                None => None,
            };
            let mut open = match kept {
                Some(open) => open,
                None => PgConnection::connect(url).await?,
            };
            let answer = work(&mut open).await;
            *connection = Some(open);
            answer
        });
        answer.map_err(|error| error.to_string())
    }
}

impl Store for PostgresStore {
    fn json(&mut self) -> Result<String, String> {
        let select = self.select;
        self.ask(async move |connection| sqlx::query_scalar::<_, String>(select).fetch_one(connection).await)
    }

    fn add(&mut self, note: &str) -> Result<(), String> {
        let insert = self.insert;
        self.ask(async move |connection| sqlx::query(insert).bind(note).execute(connection).await.map(drop))
    }
}
