//! Starting and stopping: the pid file says who serves.

use std::fs::{File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(10);

/// Names the process that serves, for as long as the file is there.
///
/// Removing the file is how the service is asked to stop: nothing but the file system is needed,
/// and a process whose directory was removed does not live on.
pub(crate) struct PidFile {
    path: PathBuf,
    config: PathBuf,
}

impl PidFile {
    pub(crate) fn of(config: &Path) -> Self {
        Self { path: config.with_file_name("run").join("notes.pid"), config: config.to_path_buf() }
    }

    pub(crate) fn claim(&self) -> Result<(), String> {
        let written = self.path.with_extension("new");
        std::fs::write(&written, std::process::id().to_string())
            .and_then(|()| std::fs::rename(&written, &self.path))
            .map_err(|e| format!("{}: {e}", self.path.display()))
    }

    pub(crate) fn is_ours(&self) -> bool {
        self.read() == Some(std::process::id())
    }

    fn read(&self) -> Option<u32> {
        std::fs::read_to_string(&self.path).ok()?.trim().parse().ok()
    }

    /// Returns the process that serves this configuration, if it is alive: its id and program.
    fn serving(&self) -> Option<(u32, PathBuf)> {
        let pid = self.read()?;
        // A pid may have been given to another program since.
        let command_line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let mut arguments = command_line.split(|byte| *byte == 0);
        let program = PathBuf::from(String::from_utf8(arguments.next()?.to_vec()).ok()?);
        let config = arguments.nth(1)?;
        (config == self.config.as_os_str().as_encoded_bytes()).then_some((pid, program))
    }
}

pub(crate) fn start(config: &Path) -> Result<String, String> {
    let config = absolute(config)?;
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let pid_file = PidFile::of(&config);
    if let Some((pid, running)) = pid_file.serving() {
        return if running == program {
            Ok("runs already".to_owned())
        } else {
            Err(format!("another release is running (pid {pid}): stop it first"))
        };
    }
    let log_path = config.with_file_name("logs").join("notes.log");
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log_path)
        .map_err(|e| format!("{}: {e}", log_path.display()))?;
    let clone = |log: &File| log.try_clone().map_err(|e| e.to_string());
    let mut service = Command::new(&program)
        .arg("serve")
        .arg(&config)
        .stdin(Stdio::null())
        .stdout(clone(&log)?)
        .stderr(log)
        // What is sent to the group of whoever starts the service is not meant for it.
        .process_group(0)
        .spawn()
        .map_err(|e| format!("{}: {e}", program.display()))?;
    let pid = service.id();
    wait_until("the service to listen", || {
        if let Ok(Some(status)) = service.try_wait() {
            // The same release, started by a caller that did not live to see it listen.
            if pid_file.serving().is_some_and(|(_, running)| running == program) {
                return Ok(true);
            }
            return Err(format!("the service ended at once ({status}); {} says why", log_path.display()));
        }
        Ok(pid_file.read() == Some(pid))
    })?;
    Ok("runs".to_owned())
}

pub(crate) fn stop(config: &Path) -> Result<String, String> {
    let config = absolute(config)?;
    let pid_file = PidFile::of(&config);
    let Some((pid, _)) = pid_file.serving() else { return Ok("not running".to_owned()) };
    std::fs::remove_file(&pid_file.path).map_err(|e| format!("{}: {e}", pid_file.path.display()))?;
    wait_until("the service to stop", || Ok(!is_alive(pid)))?;
    Ok(format!("stopped (pid {pid})"))
}

pub(crate) fn status(config: &Path) -> Result<String, String> {
    let config = absolute(config)?;
    let (pid, program) = PidFile::of(&config).serving().ok_or("not running")?;
    Ok(format!("running: {} (pid {pid})", program.display()))
}

/// Tells whether a process still runs; one that only waits for its parent does not.
fn is_alive(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit(')').next().is_some_and(|rest| !rest.trim_start().starts_with('Z')))
}

fn absolute(config: &Path) -> Result<PathBuf, String> {
    config.canonicalize().map_err(|e| format!("{}: {e}", config.display()))
}

fn wait_until(what: &str, mut done: impl FnMut() -> Result<bool, String>) -> Result<(), String> {
    let since = Instant::now();
    while !done()? {
        if since.elapsed() > PATIENCE {
            return Err(format!("waited {} s for {what}", PATIENCE.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
