//! `postmaster.pid`: which server owns a data directory, and how far it is.

use std::io;
use std::path::Path;

use rustix::process::Pid;

use super::InstanceError;

/// How far a server is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// It does not accept connections yet: it starts, or replays and is not consistent.
    Starting,
    /// It replays, and accepts no connections (`hot_standby` is off).
    Standby,
    /// It accepts connections; read-only ones if it still replays.
    Ready,
    /// It shuts down, or was stopped.
    Stopping,
}

/// Whether a server owns a data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Postmaster {
    /// There is no `postmaster.pid`.
    None,
    /// The process in `postmaster.pid` exists. It may be another program that was given the same id after a crash;
    /// nobody can tell for certain, and nothing may be written in either case.
    Alive {
        /// Its id.
        pid: u32,
    },
    /// `postmaster.pid` was left behind. A server in another container (PID namespace) looks like this too.
    Stale {
        /// The id in the file.
        pid: u32,
    },
}

/// Looks for a server that owns `data_dir`.
///
/// # Errors
/// `postmaster.pid` cannot be read or makes no sense.
pub fn postmaster_of(data_dir: &Path) -> Result<Postmaster, InstanceError> {
    let Some(PidFile { pid, .. }) = PidFile::read(data_dir)? else { return Ok(Postmaster::None) };
    let process = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let exists = process.is_some_and(|process| {
        // Not permitted means that it exists and belongs to somebody else.
        !matches!(rustix::process::test_kill_process(process), Err(rustix::io::Errno::SRCH))
    });
    Ok(if exists { Postmaster::Alive { pid } } else { Postmaster::Stale { pid } })
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PidFile {
    pub(super) pid: u32,
    pub(super) readiness: Readiness,
}

impl PidFile {
    pub(super) fn read(data_dir: &Path) -> Result<Option<Self>, InstanceError> {
        let path = data_dir.join("postmaster.pid");
        let io = |source| InstanceError::Io { what: format!("read `{}`", path.display()), source };
        match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text).map(Some).ok_or_else(|| io(io::Error::other("it names no process"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io(error)),
        }
    }

    /// Line 1 is the process (negative for a single-user backend), line 8 the state once it is known.
    fn parse(text: &str) -> Option<Self> {
        let pid: i32 = text.lines().next()?.trim().parse().ok()?;
        let readiness = match text.lines().nth(7).map(str::trim) {
            Some("ready") => Readiness::Ready,
            Some("standby") => Readiness::Standby,
            Some("stopping") => Readiness::Stopping,
            _ => Readiness::Starting,
        };
        (pid != 0).then_some(Self { pid: pid.unsigned_abs(), readiness })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_is_in_line_eight() {
        let file = |state: &str| format!("4711\n/data\n1795000000\n5432\n/tmp\n\n  123 456\n{state}\n");
        for (state, readiness) in [
            ("ready   ", Readiness::Ready),
            ("standby ", Readiness::Standby),
            ("starting", Readiness::Starting),
            ("stopping", Readiness::Stopping),
        ] {
            assert_eq!(PidFile::parse(&file(state)), Some(PidFile { pid: 4711, readiness }));
        }
        assert_eq!(PidFile::parse("-4711\n").map(|file| file.pid), Some(4711));
        for text in ["", "\n", "0\n", "x\n"] {
            assert_eq!(PidFile::parse(text), None);
        }
    }

    #[test]
    fn a_file_left_behind_is_told_from_a_server() {
        let directory = tempfile::tempdir().unwrap();
        let write = |pid: u32| {
            let mut file = std::fs::File::create(directory.path().join("postmaster.pid")).unwrap();
            io::Write::write_all(&mut file, format!("{pid}\n").as_bytes()).unwrap();
        };
        let own = std::process::id();
        write(own);
        assert_eq!(postmaster_of(directory.path()).unwrap(), Postmaster::Alive { pid: own });
        // Beyond the kernel's largest process id.
        write(1 << 30);
        assert_eq!(postmaster_of(directory.path()).unwrap(), Postmaster::Stale { pid: 1 << 30 });
    }
}
