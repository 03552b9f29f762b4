//! The quickstart's service upgraded by the real command, which is killed, started several times at
//! once, and given a disk that fails.
#![cfg(test)]

mod concurrent;
mod disk_faults;
mod faulty;
mod kill_campaign;
mod site;
mod world;
