//! What a journal's server lives in, as far as this machine can tell.

use upgrade_core::names::LockName;

use crate::address::Address;

/// Names the services of this machine whose restart would end the journal's server.
///
/// A server on this machine shows which unit of systemd its processes belong to; of one elsewhere
/// nothing is known, and the URL's `lives_in` says it.
pub(super) fn of(address: &Address, pid: i32) -> Vec<LockName> {
    if address.host() != "localhost" {
        return Vec::new();
    }
    // The number is the server's: another process has it here if the server is in a container or
    // at the other end of a tunnel.
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    if !read("comm").trim().starts_with("postgres") {
        return Vec::new();
    }
    units(&read("cgroup")).iter().filter_map(|unit| LockName::new("service", unit).ok()).collect()
}

/// Reads the unit out of `cgroup` of proc(5), in every spelling that a pipeline may use for it.
fn units(cgroup: &str) -> Vec<String> {
    let unit = cgroup
        .lines()
        .filter_map(|line| line.rsplit_once(':').map(|(_, path)| path))
        .flat_map(|path| path.rsplit('/'))
        .find_map(|part| part.strip_suffix(".service"));
    let Some(unit) = unit else { return Vec::new() };
    let mut names = vec![unit];
    // Debian's postgresql.service carries along every postgresql@VERSION-CLUSTER.service.
    if let Some((template, _)) = unit.split_once('@') {
        names.push(template);
    }
    names.iter().flat_map(|name| [(*name).to_owned(), format!("{name}.service")]).collect()
}

/// Adds the other spelling of a unit: systemd takes `postgresql` for `postgresql.service`.
pub(super) fn spellings(lock: &LockName) -> Vec<LockName> {
    let other = match lock.parts() {
        ("service", name) => match name.strip_suffix(".service") {
            Some(short) => LockName::new("service", short).ok(),
            None => LockName::new("service", &format!("{name}.service")).ok(),
        },
        _ => None,
    };
    [Some(lock.clone()), other].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_known_by_all_its_names() {
        let cgroup = "0::/system.slice/system-postgresql.slice/postgresql@15-main.service\n";
        assert_eq!(
            units(cgroup),
            ["postgresql@15-main", "postgresql@15-main.service", "postgresql", "postgresql.service"]
        );
        assert_eq!(units("1:name=systemd:/system.slice/pg.service\n0::/\n"), ["pg", "pg.service"]);
        assert_eq!(units("0::/\n"), [""; 0]);
    }
}
