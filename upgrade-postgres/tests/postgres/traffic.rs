//! Other people's sessions: connections of their own, and writers that go on writing.

#![cfg(test)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::task::JoinHandle;
use upgrade_testbed::postgres::Database;

pub(crate) async fn connect(database: &Database) -> PgConnection {
    PgConnection::connect(&database.url()).await.unwrap()
}

pub(crate) async fn run(connection: &mut PgConnection, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(connection).await.unwrap();
}

/// Writers that change `number` of the first thousand rows of `orders`, one after the other.
pub(crate) struct Writers {
    state: Arc<State>,
    tasks: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    stop: AtomicBool,
    writes: AtomicU64,
    longest: AtomicU64,
}

impl Writers {
    pub(crate) async fn start(database: &Database, writers: u64) -> Self {
        let state = Arc::new(State::default());
        let mut tasks = Vec::new();
        for number in 0..writers {
            let (state, mut connection) = (state.clone(), connect(database).await);
            tasks.push(tokio::spawn(async move {
                let mut id = number;
                while !state.stop.load(Ordering::SeqCst) {
                    let began = Instant::now();
                    id = (id * 31 + 17) % 1000 + 1;
                    run(&mut connection, &format!("update orders set number = -number where id = {id}")).await;
                    state.longest.fetch_max(u64::try_from(began.elapsed().as_millis()).unwrap(), Ordering::SeqCst);
                    state.writes.fetch_add(1, Ordering::SeqCst);
                }
            }));
        }
        Self { state, tasks }
    }

    /// Counts the writes so far.
    pub(crate) fn count(&self) -> u64 {
        self.state.writes.load(Ordering::SeqCst)
    }

    /// Ends them, and tells how long the longest write took.
    pub(crate) async fn stop(self) -> Duration {
        self.state.stop.store(true, Ordering::SeqCst);
        for task in self.tasks {
            task.await.unwrap();
        }
        Duration::from_millis(self.state.longest.load(Ordering::SeqCst))
    }
}
