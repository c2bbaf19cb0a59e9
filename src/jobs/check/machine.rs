//! This machine: its state directory, its secrets, its roles.

use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::fs::{Access, access};

use super::finding::{Finding, Findings};
use super::subject::Subject;
use crate::jobs::context::Target;
use crate::pg::instance::{Network, User};

/// `sun_path` on Linux, less the final zero.
const MAX_SOCKET_PATH: usize = 107;

pub(super) fn check(subject: &Subject, targets: &[&Target]) -> Vec<Finding> {
    let mut list = state_dir(&subject.state_dir);
    for path in &subject.secret_files {
        list.extend(secret(path));
    }
    for (region, roles) in &subject.shared_roles {
        let mut findings = Findings::about("region", region);
        findings.warn(
            format!("one set of credentials serves {roles}: a stolen host can do all of it"),
            format!(
                "[regions.{region}] credentials = {{ write = …, restore = …, prune = … }}, each with its own rights"
            ),
        );
        list.extend(findings.into_list());
    }
    for target in targets {
        list.extend(socket(target));
    }
    list
}

/// What drills will be able to promise of their scratch clusters.
pub(super) async fn scratch(subject: &Subject) -> Vec<Finding> {
    let place = &subject.scratch;
    let mut findings = Findings::about("machine", place.directory.display());
    let user = match (&place.run_as, rustix::process::geteuid().is_root()) {
        (Some(name), true) => match User::named(name) {
            Ok(user) => Some(user),
            Err(error) => {
                findings.fail(format!("drills: {error}"), "[drill] run_as = an account of this machine");
                return findings.into_list();
            }
        },
        (None, true) => {
            let what = "drills: PostgreSQL does not run as root, and drctl does";
            findings.warn(what, "[drill] run_as = \"postgres\"");
            return findings.into_list();
        }
        (_, false) => None,
    };
    match Network::probe(user).await {
        Network::Isolated => findings.ok("drills: network isolated, in a namespace of its own"),
        Network::Shared => findings.warn(
            "drills: network shared: functions in the database could reach out of a scratch cluster",
            "allow network namespaces: run drctl as root, or sysctl kernel.unprivileged_userns_clone=1; needs unshare(1)",
        ),
    }
    findings.into_list()
}

fn state_dir(path: &Path) -> Vec<Finding> {
    let mut findings = Findings::about("machine", path.display());
    match std::fs::metadata(path) {
        Err(error) => {
            let fix = format!("install -d -m 700 {}   as the user that runs drctl", path.display());
            findings.fail(format!("the state directory is not there: {error}"), fix);
        }
        Ok(found) if found.mode() & 0o077 != 0 => {
            let what = format!("others can look into the state directory (mode {:03o})", found.mode() & 0o777);
            findings.fail(what, format!("chmod 700 {}", path.display()));
        }
        Ok(_) => match access(path, Access::WRITE_OK | Access::EXEC_OK) {
            Ok(()) => findings.ok("state directory is ours alone"),
            Err(error) => findings.fail(
                format!("the state directory cannot be written: {error}"),
                format!("chown it to the user that runs drctl: {}", path.display()),
            ),
        },
    }
    findings.into_list()
}

fn secret(path: &Path) -> Vec<Finding> {
    let mut findings = Findings::about("machine", path.display());
    // A file that is not here is told by whoever needs it: an identity should not be.
    if let Ok(found) = std::fs::metadata(path) {
        match found.mode() & 0o077 {
            0 => findings.ok("only its owner can read this secret"),
            _ => findings.fail("others can read this secret", format!("chmod 600 {}", path.display())),
        }
    }
    findings.into_list()
}

fn socket(target: &Target) -> Vec<Finding> {
    let mut findings = Findings::about("machine", target.control_socket.display());
    let length = target.control_socket.as_os_str().as_bytes().len();
    if length > MAX_SOCKET_PATH {
        let what = format!("the path of the control socket has {length} bytes, and {MAX_SOCKET_PATH} are possible");
        findings.fail(what, format!("[targets.{}] control_socket = a shorter path", target.name));
    }
    findings.into_list()
}
