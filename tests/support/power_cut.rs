//! What a power cut would have left of a program's files: its file operations as strace recorded them, without everything
//! that was not flushed.
//!
//! The strictest reading of what a file system promises: bytes survive if the file was flushed after they were written, a
//! name survives if its directory was flushed after it was given, and what has a durable name in a directory that has
//! none is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const OPERATIONS: &str = "trace=openat,write,writev,pwrite64,pwritev,sendto,sendmsg,copy_file_range,fsync,fdatasync,\
     sync_file_range,syncfs,link,linkat,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,rmdir";

/// A recording that grows while the program runs.
#[derive(Debug)]
pub struct Recording {
    journal: PathBuf,
    root: PathBuf,
    /// What was there before, which is durable: directories, and files with their length.
    before: BTreeMap<PathBuf, Option<u64>>,
}

/// Which flushes the disk honours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disk {
    /// All of them.
    Honest,
    /// Those of directories alone.
    ForgetsBytes,
    /// Those of files alone.
    ForgetsNames,
}

/// One operation that was done.
#[derive(Debug, Clone)]
struct Operation {
    /// The line in which it began: what a flush covers was done before.
    begun: usize,
    name: String,
    words: String,
    result: String,
}

impl Recording {
    /// A program whose files below `root` are watched, not yet started.
    pub fn of<S: AsRef<OsStr>>(
        (journal, root): (PathBuf, &Path),
        program: &str,
        arguments: impl IntoIterator<Item = S>,
    ) -> (Self, Command) {
        let mut before = BTreeMap::new();
        walk(root, &mut before);
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-y", "-s", "400", "--seccomp-bpf", "-e", OPERATIONS, "-e", "signal=none", "-o"]);
        strace.arg(&journal).arg(program).args(arguments);
        (Self { journal, root: root.to_owned(), before }, strace)
    }

    fn lines(&self) -> Vec<String> {
        let text = String::from_utf8_lossy(&fs::read(&self.journal).unwrap()).into_owned();
        text.lines().map(str::to_owned).collect()
    }

    /// The lines in which the program begins to say something over a socket that contains `words`.
    pub fn told(&self, words: &str) -> Vec<usize> {
        let words = words.replace('"', "\\\"");
        let told = |line: &String| line.contains("<socket:") && line.contains(&words);
        self.lines().iter().enumerate().filter(|(_, line)| told(line)).map(|(at, _)| at).collect()
    }

    /// The files below the root that are left if power fails just before line `at`, by their path from there, and how much
    /// of them.
    pub fn left(&self, at: usize, disk: Disk) -> BTreeMap<PathBuf, u64> {
        let mut files = Files::standing(&self.root, disk, &self.before);
        for operation in operations(&self.lines()[..at]) {
            files.apply(&operation);
        }
        files.left()
    }

    /// Copies what is left to `place`. What the program removed later is not there any more: it comes back as zeros.
    pub fn leave(&self, at: usize, place: &Path) {
        for (path, length) in self.left(at, Disk::Honest) {
            let to = place.join(&path);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            let mut bytes = fs::read(self.root.join(&path)).unwrap_or_default();
            bytes.resize(usize::try_from(length).unwrap(), 0);
            fs::write(to, bytes).unwrap();
        }
    }
}

fn walk(directory: &Path, found: &mut BTreeMap<PathBuf, Option<u64>>) {
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let kind = entry.metadata().unwrap();
        found.insert(entry.path(), kind.is_file().then_some(kind.len()));
        if kind.is_dir() {
            walk(&entry.path(), found);
        }
    }
}

/// Operations that ended, in the order in which they did. One that was interrupted by others is told in two lines.
fn operations(lines: &[String]) -> Vec<Operation> {
    let (mut open, mut done) = (BTreeMap::<&str, (usize, &str)>::new(), Vec::new());
    for (number, line) in lines.iter().enumerate() {
        let Some((pid, call)) = line.split_once(' ') else { continue };
        let call = call.trim_start();
        let (begun, whole) = if let Some(first) = call.strip_suffix(" <unfinished ...>") {
            open.insert(pid, (number, first));
            continue;
        } else if call.starts_with("<... ") {
            let (_, rest) = call.split_once(" resumed>").unwrap();
            let Some((begun, first)) = open.remove(pid) else { continue };
            (begun, format!("{first}{rest}"))
        } else {
            (number, call.to_owned())
        };
        let Some((name, rest)) = whole.split_once('(') else { continue };
        // The result stands behind the last `=`; a path in it may hold none.
        let Some((words, result)) = rest.rsplit_once(" = ") else { continue };
        if !result.starts_with('-') {
            let (name, result) = (name.to_owned(), result.to_owned());
            done.push(Operation { begun, name, words: words.to_owned(), result });
        }
    }
    done
}

#[derive(Debug, Default, Clone, Copy)]
struct Bytes {
    written: u64,
    flushed: u64,
}

/// What a name stands for: a file by its number, or a directory.
type Named = Option<usize>;

#[derive(Debug)]
struct Files {
    root: PathBuf,
    disk: Disk,
    files: Vec<Bytes>,
    /// When each file was written last, and each name given: a flush that had begun by then may have missed it.
    written_at: Vec<usize>,
    names: BTreeMap<PathBuf, (Named, usize)>,
    durable: BTreeMap<PathBuf, Named>,
}

impl Files {
    fn standing(root: &Path, disk: Disk, before: &BTreeMap<PathBuf, Option<u64>>) -> Self {
        let (files, written_at, names, durable) = Default::default();
        let mut standing = Self { root: root.to_owned(), disk, files, written_at, names, durable };
        for (path, length) in before {
            let named = length.map(|length| {
                standing.files.push(Bytes { written: length, flushed: length });
                standing.written_at.push(0);
                standing.files.len() - 1
            });
            standing.names.insert(path.clone(), (named, 0));
            standing.durable.insert(path.clone(), named);
        }
        standing
    }

    fn apply(&mut self, operation: &Operation) {
        let Operation { begun, name, words, result } = operation;
        match name.as_str() {
            "openat" if words.contains("O_CREAT") => self.create(&descriptor(result), *begun),
            "write" | "writev" | "pwrite64" | "pwritev" => self.write(&descriptor(words), number(result), *begun),
            "copy_file_range" | "sync_file_range" => panic!("nobody reads that yet: {operation:?}"),
            "fsync" | "fdatasync" => self.flush(&descriptor(words), *begun),
            "syncfs" => self.flush_all(),
            "mkdir" | "mkdirat" => self.give(&paths(words)[0], None, *begun),
            "link" | "linkat" | "rename" | "renameat" | "renameat2" => self.link(name, &paths(words), *begun),
            "unlink" | "unlinkat" | "rmdir" => {
                self.names.remove(&paths(words)[0]);
            }
            _ => {}
        }
    }

    fn is_ours(&self, path: &Path) -> bool {
        path.starts_with(&self.root)
    }

    fn give(&mut self, path: &Path, named: Named, at: usize) {
        if self.is_ours(path) {
            self.names.insert(path.to_owned(), (named, at));
        }
    }

    fn create(&mut self, path: &Path, at: usize) {
        if self.is_ours(path) && !self.names.contains_key(path) {
            self.files.push(Bytes::default());
            self.written_at.push(at);
            self.give(path, Some(self.files.len() - 1), at);
        }
    }

    fn write(&mut self, path: &Path, bytes: u64, at: usize) {
        if let Some((Some(file), _)) = self.names.get(path) {
            self.files[*file].written += bytes;
            self.written_at[*file] = at;
        }
    }

    /// A new name; the old one stays until its directory is flushed.
    fn link(&mut self, operation: &str, paths: &[PathBuf], at: usize) {
        let [from, to] = paths else { panic!("{operation} of {paths:?}") };
        let named = match operation.starts_with("rename") {
            true => self.names.remove(from),
            false => self.names.get(from).copied(),
        };
        if let Some((named, _)) = named {
            assert!(named.is_some(), "directories are not renamed: {paths:?}");
            self.give(to, named, at);
        }
    }

    fn flush(&mut self, path: &Path, begun: usize) {
        match self.names.get(path) {
            Some((Some(file), _)) => {
                let file = *file;
                if self.disk != Disk::ForgetsBytes && self.written_at[file] < begun {
                    self.files[file].flushed = self.files[file].written;
                }
            }
            _ if self.disk != Disk::ForgetsNames => self.flush_directory(path, begun),
            _ => {}
        }
    }

    fn flush_directory(&mut self, directory: &Path, begun: usize) {
        let inside = |path: &Path| path.parent() == Some(directory);
        self.durable.retain(|path, _| !inside(path) || self.names.contains_key(path));
        let given = self.names.iter().filter(|(path, (_, at))| inside(path) && *at < begun);
        self.durable.extend(given.map(|(path, (named, _))| (path.clone(), *named)));
    }

    fn flush_all(&mut self) {
        if self.disk == Disk::Honest {
            self.files.iter_mut().for_each(|file| file.flushed = file.written);
            self.durable = self.names.iter().map(|(path, (named, _))| (path.clone(), *named)).collect();
        }
    }

    fn left(&self) -> BTreeMap<PathBuf, u64> {
        let directories: BTreeSet<_> =
            self.durable.iter().filter(|(_, named)| named.is_none()).map(|(p, _)| p).collect();
        let reached = |path: &PathBuf| {
            let above = path.ancestors().skip(1).take_while(|above| **above != self.root);
            above.into_iter().all(|above| directories.contains(&above.to_owned()))
        };
        let files = self.durable.iter().filter_map(|(path, named)| Some((path, self.files[(*named)?].flushed)));
        let files = files.filter(|(path, _)| reached(path));
        files.map(|(path, length)| (path.strip_prefix(&self.root).unwrap().to_owned(), length)).collect()
    }
}

/// The path of the first descriptor in `words`.
fn descriptor(words: &str) -> PathBuf {
    let path = words.split_once('<').and_then(|(_, rest)| rest.split_once('>'));
    path.map_or_else(PathBuf::new, |(path, _)| PathBuf::from(path))
}

/// Every path among the words: `3</directory>, "name"` or `"/path"`.
fn paths(words: &str) -> Vec<PathBuf> {
    let (mut paths, mut rest) = (Vec::new(), words);
    while let Some((before, behind)) = rest.split_once('"') {
        let (name, next) = behind.split_once('"').unwrap();
        let directory = before.rsplit_once('<').and_then(|(_, of)| of.split_once('>')).map(|(path, _)| path);
        paths.push(Path::new(directory.unwrap_or("/")).join(name));
        rest = next;
    }
    paths
}

fn number(result: &str) -> u64 {
    result.split_whitespace().next().unwrap().parse().unwrap()
}
