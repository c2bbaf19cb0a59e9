//! Programs that end with us, also when we are killed: without a parent nobody reads what they write, and what they hold on a
//! server they hold for as long as they wait.
//!
//! The kernel takes the wish only from the process that it is about, so drctl starts itself, and that process becomes the
//! program.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Signal, getppid, set_parent_process_death_signal};

/// The word after which this program becomes another: `drctl with-parent PID PROGRAM ARGUMENT…`.
pub const VERB: &str = "with-parent";
/// This very program, whatever became of its file.
pub const SELF: &str = "/proc/self/exe";

/// The words behind [`SELF`]. The kernel watches the thread that starts the program: it must be one that stays.
pub fn words() -> Vec<String> {
    vec![VERB.to_owned(), std::process::id().to_string()]
}

/// Becomes the program that stands behind [`VERB`]; returns only if that fails.
pub fn become_it(words: &[OsString]) -> io::Error {
    let wrong = || io::Error::other(format!("{VERB} is for drctl itself"));
    let [parent, program, arguments @ ..] = words else { return wrong() };
    if let Err(error) = set_parent_process_death_signal(Some(Signal::KILL)) {
        return error.into();
    }
    // Who died before the wish was made sends no signal any more.
    let own = getppid().map(|pid| pid.as_raw_nonzero().get().to_string());
    if own.as_deref() != parent.to_str() {
        return io::Error::other("whoever started this is gone");
    }
    Command::new(program).args(arguments).exec()
}
