//! File systems of a few MiB, so that a disk can be full.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::process;

/// A tmpfs, unmounted on drop. Mounting takes root, as which the suite runs.
#[derive(Debug)]
pub struct Tmpfs {
    path: PathBuf,
}

impl Tmpfs {
    /// Mounts `mib` MiB on a new directory.
    pub fn mount(path: PathBuf, mib: u32) -> Self {
        fs::create_dir_all(&path).unwrap();
        let options = format!("size={mib}m,mode=755");
        process::run(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "drctl-test"]).arg(&path));
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it another size; what is in it stays.
    pub fn resize(&self, mib: u32) {
        let options = format!("remount,size={mib}m");
        process::run(Command::new("mount").args(["-o", &options]).arg(&self.path));
    }

    /// Takes all the space that is left, until [`free`](Self::free).
    pub fn fill(&self) {
        let mut file = File::create(self.filler()).unwrap();
        let block = vec![1; 1 << 20];
        while file.write_all(&block).is_ok() {}
        while file.write_all(&block[..4096]).is_ok() {}
    }

    /// Gives back what [`fill`](Self::fill) took.
    pub fn free(&self) {
        fs::remove_file(self.filler()).unwrap();
    }

    fn filler(&self) -> PathBuf {
        self.path.join("filler")
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        // Lazily, since a server that still ends may have files open there.
        let _gone = Command::new("umount").arg("--lazy").arg(&self.path).status();
    }
}
