//! The kinds of checks, one module each.

mod backup;
mod command;
mod config;
mod cpu;
mod disk;
mod file;
mod http_get;
mod http_probe;
mod load;
mod memory;
mod prometheus_query;
mod tcp_connect;

pub use backup::{BackupCheck, BackupCheckConfig};
pub use command::{CommandCheck, CommandCheckConfig};
pub use config::{ConfigCheck, ConfigCheckConfig};
pub use cpu::{CpuCheck, CpuCheckConfig};
pub use disk::{DiskCheck, DiskCheckConfig};
pub use file::{FileCheck, FileCheckConfig};
pub use http_get::{HttpGetCheck, HttpGetCheckConfig, Statuses};
pub use http_probe::{HttpProbeCheck, HttpProbeCheckConfig};
pub use load::{LoadCheck, LoadCheckConfig};
pub use memory::{MemoryCheck, MemoryCheckConfig};
pub use prometheus_query::{PrometheusQueryCheck, PrometheusQueryCheckConfig};
pub use tcp_connect::{TcpConnectCheck, TcpConnectCheckConfig};

use upgrade_core::registry::Registry;

/// Registers every kind of check: its name, what it asks, and how it is made.
pub(crate) fn register(registry: &mut Registry) {
    registry
        .check("host.backup", "Asks for a backup that is recent and reads back whole", BackupCheck::from_config)
        .check("host.command", "Runs a program whose exit code is the answer", CommandCheck::from_config)
        .check(
            "host.config",
            "Asks a configuration file for required, mistyped and deprecated keys",
            ConfigCheck::from_config,
        )
        .check("host.cpu", "Measures how busy the processors are", CpuCheck::from_config)
        .check("host.disk", "Measures how much space a file system has left", DiskCheck::from_config)
        .check("host.file", "Asks whether a file is there and what it says", FileCheck::from_config)
        .check("host.load", "Measures how many processes wait for each processor", LoadCheck::from_config)
        .check("host.memory", "Measures how much memory is available", MemoryCheck::from_config)
        .check("http.get", "Asks a URL once and looks at the reply", HttpGetCheck::from_config)
        .check("http.probe", "Measures errors and latencies of a URL at a steady rate", HttpProbeCheck::from_config)
        .check(
            "prometheus.query",
            "Asks a Prometheus for one figure and holds it to limits",
            PrometheusQueryCheck::from_config,
        )
        .check("tcp.connect", "Connects to a port and reads the answer", TcpConnectCheck::from_config);
}
