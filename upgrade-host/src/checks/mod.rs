//! The kinds of checks, one module each.

use upgrade_core::registry::Registry;

pub mod backup;
pub mod command;
pub mod config;
pub mod cpu;
pub mod disk;
pub mod file;
pub mod http_get;
pub mod http_probe;
pub mod load;
pub mod memory;
pub mod tcp_connect;

pub(crate) fn register(registry: &mut Registry) {
    registry.check("host.command", "Runs a program whose exit code is the answer", command::CommandCheck::from_config);
    registry.check("host.cpu", "Measures how busy the processors are", cpu::Cpu::from_config);
    registry.check("host.disk", "Measures how much space a file system has left", disk::Disk::from_config);
    registry.check("host.file", "Looks whether a file is there and what it says", file::FileCheck::from_config);
    registry.check("host.load", "Reads how many processes wait for each processor", load::Load::from_config);
    registry.check("host.memory", "Measures how much memory is available", memory::Memory::from_config);
    registry.check("http.get", "Asks a URL once and looks at the reply", http_get::HttpGet::from_config);
    registry.check("http.probe", "Measures errors and latencies at a steady rate", http_probe::HttpProbe::from_config);
    registry.check("tcp.connect", "Connects to a port and reads the answer", tcp_connect::TcpConnect::from_config);
    backup::register(registry);
    config::register(registry);
}
