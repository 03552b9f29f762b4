//! Steps and checks for Docker Engine and Compose.
