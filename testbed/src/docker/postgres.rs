//! An image of PostgreSQL that is used as Docker Hub's is, made from this machine's own programs.

use std::path::{Path, PathBuf};

use super::{Engine, Image};

/// What the image is called on an engine.
const NAME: &str = "upgrade-testbed-postgres:15";
/// Where Debian has the programs, and what they read.
const PROGRAMS: &str = "/usr/lib/postgresql/15";
const SHARED: &str = "/usr/share/postgresql/15";

impl Engine {
    /// Makes an image of PostgreSQL 15 on the engine, unless it has one; returns its name.
    ///
    /// Of what Docker Hub's image understands it has `POSTGRES_USER`, `POSTGRES_PASSWORD` and
    /// `POSTGRES_DB`, scripts in `/docker-entrypoint-initdb.d` that end in `.sql`, and the volume at
    /// `/var/lib/postgresql/data`. None, with a printed reason, where the programs are missing.
    ///
    /// # Panics
    /// As [`Image::build`]; under `CI=true` also where the programs are missing.
    pub fn postgres(&self) -> Option<String> {
        let programs = PathBuf::from(PROGRAMS);
        if !programs.join("bin/postgres").is_file() {
            super::missing(&format!("there is no {PROGRAMS}; on Debian: apt-get install postgresql"));
            return None;
        }
        let found = self.command(["image", "inspect", "--format", "{{.Id}}", NAME]).output();
        if !found.is_ok_and(|asked| asked.status.success()) {
            image(&programs).build(self, NAME);
        }
        Some(NAME.to_owned())
    }
}

fn image(programs: &Path) -> Image {
    let entrypoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/docker/postgres-entrypoint");
    let mut image = Image::shell("exit 1")
        .file("bin/docker-entrypoint", &entrypoint)
        .with("ENTRYPOINT [\"/bin/docker-entrypoint\"]")
        .with("CMD [\"postgres\"]")
        .with("ENV PATH=/usr/lib/postgresql/15/bin:/bin PGDATA=/var/lib/postgresql/data")
        .with("EXPOSE 5432")
        .with("VOLUME /var/lib/postgresql/data")
        .with("STOPSIGNAL SIGINT")
        // Its clients ask for it by name, and it has no other.
        .file("usr/share/zoneinfo/UTC", Path::new("/usr/share/zoneinfo/UTC"));
    for name in ["postgres", "initdb", "pg_ctl", "pg_isready", "psql", "pg_dump", "pg_restore"] {
        image = image.program_at(&programs.join("bin").join(name));
    }
    for path in files_below(&programs.join("lib")) {
        // Compiling queries takes more room than all the rest.
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".so") && !name.starts_with("llvmjit") && path.parent() == Some(&programs.join("lib")) {
            image = image.program_at(&path);
        }
    }
    for path in files_below(Path::new(SHARED)) {
        let place = path.to_string_lossy().into_owned();
        if !place.contains("/man/") {
            image = image.file(place.trim_start_matches('/'), &path);
        }
    }
    image
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let listed = std::fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut all = Vec::new();
    for path in listed.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            all.extend(files_below(&path));
        } else {
            all.push(path);
        }
    }
    all
}
