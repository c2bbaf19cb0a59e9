//! A clock that is set while programs run by it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};

use super::process;

/// Wall-clock time of whoever is given [`environment`](Self::environment); what measures durations stays right.
#[derive(Debug, Clone)]
pub struct FakeClock {
    file: PathBuf,
    library: String,
    users: Arc<Users>,
}

/// Processes that run by a clock. One that is killed leaves its shared memory, which goes with the clock.
#[derive(Debug, Default)]
struct Users(Mutex<Vec<u32>>);

impl Drop for Users {
    fn drop(&mut self) {
        for pid in self.0.get_mut().unwrap() {
            for name in ["faketime_shm_", "sem.faketime_sem_"] {
                let _gone = fs::remove_file(format!("/dev/shm/{name}{pid}"));
            }
        }
    }
}

impl FakeClock {
    /// Right until it is set. The file is read by every process that runs by this clock.
    pub fn new(file: PathBuf) -> Self {
        // The library is where only its own command finds it.
        let found = process::run(Command::new("faketime").args(["-m", "-f", "+0", "printenv", "LD_PRELOAD"]));
        let clock = Self { file, library: found.trim().to_owned(), users: Arc::default() };
        clock.set("+0");
        clock
    }

    /// Sets it off by `offset` from now on, as faketime writes it: `+1d`.
    pub fn set(&self, offset: &str) {
        let next = self.file.with_extension("next");
        fs::write(&next, format!("{offset}\n")).unwrap();
        fs::set_permissions(&next, fs::Permissions::from_mode(0o644)).unwrap();
        fs::rename(next, &self.file).unwrap();
    }

    /// What a process must find in its environment.
    pub fn environment(&self) -> [(&'static str, String); 4] {
        [
            ("LD_PRELOAD", self.library.clone()),
            ("FAKETIME_TIMESTAMP_FILE", self.file.display().to_string()),
            ("FAKETIME_NO_CACHE", "1".to_owned()),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ]
    }

    /// A process that was started with it.
    pub fn used_by(&self, pid: u32) {
        self.users.0.lock().unwrap().push(pid);
    }
}
