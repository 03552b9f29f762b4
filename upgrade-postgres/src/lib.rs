//! Steps and checks for PostgreSQL.
