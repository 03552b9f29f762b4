//! What ends a service when the process that started it is gone, however it went.

use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};

use crate::home::Home;

/// Ends the process that left its number in the file `pid` of the directory `$1`, where it runs.
pub(crate) const END_BY_NUMBER: &str = r#"
    pid=$(cat "$1/pid" 2>/dev/null)
    # The number alone may be another process's by now.
    [ -n "$pid" ] && [ "$(readlink "/proc/$pid/cwd")" = "$1" ] && kill -KILL "$pid"
"#;

/// Watches over the directory of a service; let go of, it ends the service and removes the directory.
#[derive(Debug)]
pub(crate) struct Guardian {
    shell: Child,
    /// It closes with this process.
    pipe: Option<ChildStdin>,
}

impl Guardian {
    /// Begins to watch; `end` is a shell script that ends what runs in the directory `$1`.
    pub(crate) fn over(directory: &Path, end: &str) -> Self {
        const SCRIPT: &str = r#"
            read -r line
            [ -d "$1" ] || exit 0
            sh -c "$2" sh "$1"
            rm -rf "$1"
        "#;
        let mut shell = Home::apart("sh")
            .args(["-c", SCRIPT, "sh"])
            .arg(directory)
            .arg(end)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh can be started");
        let pipe = shell.stdin.take();
        Self { shell, pipe }
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let _ = self.shell.wait();
    }
}
