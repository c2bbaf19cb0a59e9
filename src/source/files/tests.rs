//! There and back, beside GNU tar, and against archives that were made to do harm.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;

use super::entry::{Entry, Kind, padding, write_end};
use super::*;
use crate::model::Kind as ErrorKind;

fn write(path: &Path, bytes: &[u8]) {
    fs::File::create(path).unwrap().write_all(bytes).unwrap();
}

fn options(roots: &[&Path]) -> Options {
    Options { roots: roots.iter().map(|root| (*root).to_owned()).collect(), ..Options::default() }
}

fn packed(options: &Options) -> (Vec<u8>, Contents, Told) {
    let mut archive = Vec::new();
    let (contents, told) = pack::pack(options, &mut archive).unwrap();
    (archive, contents, told)
}

/// Everything that two trees must have in common, by name.
fn look(root: &Path) -> BTreeMap<Vec<u8>, String> {
    fn below(root: &Path, directory: &Path, seen: &mut BTreeMap<Vec<u8>, String>) {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            let found = fs::symlink_metadata(&path).unwrap();
            let kind = found.file_type();
            let content = if kind.is_file() {
                format!("{:?} {}", crc32c::crc32c(&fs::read(&path).unwrap()), found.len())
            } else if kind.is_symlink() {
                format!("{:?}", fs::read_link(&path).unwrap())
            } else {
                format!("{kind:?} {}", found.rdev())
            };
            let attributes: Vec<_> = ["user.note", "user.a=b"]
                .iter()
                .filter_map(|name| {
                    let mut value = vec![0; 4096];
                    let length = rustix::fs::lgetxattr(&path, *name, &mut value[..]).ok()?;
                    Some((*name, value[..length].to_vec()))
                })
                .collect();
            let line = format!(
                "{:o} {}:{} {}.{} links {} {attributes:?} {content}",
                found.mode(),
                found.uid(),
                found.gid(),
                found.mtime(),
                found.mtime_nsec(),
                if kind.is_dir() { 1 } else { found.nlink() }
            );
            seen.insert(path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec(), line);
            if kind.is_dir() {
                below(root, &path, seen);
            }
        }
    }
    let mut seen = BTreeMap::new();
    below(root, root, &mut seen);
    seen
}

fn restored(archive: &[u8]) -> (tempfile::TempDir, Unpacked) {
    let out = tempfile::tempdir().unwrap();
    let unpacked = unpack(&mut &archive[..], out.path()).unwrap();
    (out, unpacked)
}

/// A tree with one of everything.
fn strange_tree(root: &Path) {
    let join = |name: &str| root.join(name);
    fs::create_dir_all(join("deep/below")).unwrap();
    fs::create_dir(join("empty")).unwrap();
    write(&join("plain"), b"hello\n");
    write(&join("nothing"), b"");
    write(&join("secret"), b"s3cret");
    fs::hard_link(join("plain"), join("deep/other-name")).unwrap();
    symlink("/etc/passwd", join("away")).unwrap();
    symlink("nowhere", join("deep/dangling")).unwrap();
    let long = "n".repeat(200);
    write(&join(&long), &vec![7; 700]);
    symlink("t".repeat(300), join("long-link")).unwrap();
    write(&root.join(OsStr::from_bytes(b"bad-\xff\xfe-name")), b"bytes");
    write(&root.join(OsStr::from_bytes(&[b"bad-\xff\n=".as_slice(), &[b'x'; 150]].concat())), b"more bytes");
    let sparse = fs::File::create(join("sparse")).unwrap();
    sparse.set_len(1 << 26).unwrap();
    sparse.write_all_at(b"in the middle", 50_000_001).unwrap();
    fs::File::create(join("only-a-hole")).unwrap().set_len(3_000_000).unwrap();
    write(&join("large"), &(0..3_000_000u32).map(|n| u8::try_from(n % 251).unwrap()).collect::<Vec<_>>());
    for (name, attribute, value) in [
        ("plain", "user.note", b"line\nand \xff".as_slice()),
        ("deep", "user.a=b", b"%3D"),
        ("secret", "user.note", b""),
    ] {
        rustix::fs::setxattr(join(name), attribute, value, rustix::fs::XattrFlags::empty()).unwrap();
    }
    fs::set_permissions(join("secret"), fs::Permissions::from_mode(0o4400)).unwrap();
    let mode = rustix::fs::Mode::from_raw_mode(0o640);
    rustix::fs::mknodat(rustix::fs::CWD, join("pipe"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(join("large"), Some(12_345), Some(4_000_000)).unwrap();
        std::os::unix::fs::lchown(join("away"), Some(1), Some(1)).unwrap();
    }
    fs::File::open(join("plain"))
        .unwrap()
        .set_modified(std::time::UNIX_EPOCH - std::time::Duration::from_millis(1_250))
        .unwrap();
    fs::set_permissions(join("deep/below"), fs::Permissions::from_mode(0o500)).unwrap();
}

#[test]
fn one_of_everything_comes_back_as_it_was() {
    let tree = tempfile::tempdir().unwrap();
    strange_tree(tree.path());
    let socket = std::os::unix::net::UnixListener::bind(tree.path().join("socket")).unwrap();
    let (archive, contents, told) = packed(&options(&[tree.path()]));
    assert!(archive.len() < 4_000_000, "holes were packed: {}", archive.len());
    assert_eq!(archive, packed(&options(&[tree.path()])).0, "one tree gives one archive");
    drop(socket);
    fs::remove_file(tree.path().join("socket")).unwrap();
    assert_eq!((told.left_out.len(), told.notes.len()), (0, 1), "{told:?}");
    assert!(told.notes[0].contains("socket"), "{told:?}");

    let (out, unpacked) = restored(&archive);
    let back = out.path().join(tree.path().strip_prefix("/").unwrap());
    assert_eq!(look(&back), look(tree.path()));
    assert_eq!(unpacked.contents.files, contents.files);
    let sparse = fs::metadata(back.join("sparse")).unwrap();
    assert!(sparse.len() == 1 << 26 && sparse.blocks() < 100, "{} blocks", sparse.blocks());
    let [plain, other] = ["plain", "deep/other-name"].map(|name| fs::metadata(back.join(name)).unwrap().ino());
    assert_eq!(plain, other);
}

/// Lets something happen once these bytes have gone by.
struct Meddler<F: FnOnce()> {
    archive: Vec<u8>,
    cue: &'static [u8],
    then: Option<F>,
}

impl<F: FnOnce()> Write for Meddler<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.archive.extend_from_slice(bytes);
        if self.archive.windows(self.cue.len()).any(|seen| seen == self.cue)
            && let Some(then) = self.then.take()
        {
            then();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A second name is a link only to what is in the archive: what became of the file since is packed as a file of its own.
#[test]
fn another_name_of_a_file_that_changed_is_no_link() {
    let tree = tempfile::tempdir().unwrap();
    let (first, second) = (tree.path().join("a-first"), tree.path().join("b-second"));
    write(&first, b"as it was");
    fs::hard_link(&first, &second).unwrap();
    let changed = second.clone();
    let then = || fs::File::options().append(true).open(changed).unwrap().write_all(b", and more").unwrap();
    let mut meddler = Meddler { archive: Vec::new(), cue: b"as it was", then: Some(then) };
    pack::pack(&options(&[tree.path()]), &mut meddler).unwrap();
    let (out, _) = restored(&meddler.archive);
    let back = out.path().join(tree.path().strip_prefix("/").unwrap());
    let read = |name: &str| fs::read_to_string(back.join(name)).unwrap();
    assert_eq!((read("a-first").as_str(), read("b-second").as_str()), ("as it was", "as it was, and more"));

    // Left alone, it is one file with two names.
    let (out, _) = restored(&packed(&options(&[tree.path()])).0);
    let back = out.path().join(tree.path().strip_prefix("/").unwrap());
    let [one, two] = ["a-first", "b-second"].map(|name| fs::metadata(back.join(name)).unwrap().ino());
    assert_eq!(one, two);
}

#[test]
fn gnu_tar_takes_over() {
    let (tree, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    strange_tree(tree.path());
    let archive = out.path().join("files.tar");
    write(&archive, &packed(&options(&[tree.path()])).0);
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "-xpf"]).arg(&archive).arg("-C").arg(out.path());
    let output = tar.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let back = out.path().join(tree.path().strip_prefix("/").unwrap());
    assert_eq!(look(&back), look(tree.path()));
    assert!(fs::metadata(back.join("sparse")).unwrap().blocks() < 100);
}

#[test]
fn include_and_exclude_choose() {
    let tree = tempfile::tempdir().unwrap();
    let join = |name: &str| tree.path().join(name);
    for directory in ["a/b", "cache/x", "none"] {
        fs::create_dir_all(join(directory)).unwrap();
    }
    for file in ["a/b/keep.tf", "a/b/other", "cache/x/lost.tf", "top.tf"] {
        write(&join(file), file.as_bytes());
    }
    let chosen = Options {
        include: vec![Pattern::parse("*.tf").unwrap()],
        exclude: vec![Pattern::parse("cache").unwrap()],
        ..options(&[tree.path()])
    };
    let (out, _) = restored(&packed(&chosen).0);
    let back = look(&out.path().join(tree.path().strip_prefix("/").unwrap()));
    let names: Vec<_> = back.keys().map(|name| String::from_utf8_lossy(name)).collect();
    assert_eq!(names, ["a", "a/b", "a/b/keep.tf", "top.tf"]);
}

#[test]
fn an_archive_of_nothing_is_an_error_and_an_empty_root_is_told() {
    let (tree, empty) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    write(&tree.path().join("kept"), b"1");
    let pattern = |text: &str| vec![Pattern::parse(text).unwrap()];
    let no_match = Options { include: pattern("nomatch"), ..options(&[tree.path()]) };
    let all_out = Options { exclude: pattern("**"), ..options(&[tree.path()]) };
    for nothing in [no_match, all_out, options(&[empty.path()])] {
        let error = pack::pack(&nothing, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("nothing in"), "{nothing:?}: {error}");
    }
    let (_, _, told) = packed(&options(&[tree.path(), empty.path()]));
    assert!(told.left_out.len() == 1 && told.left_out[0].contains("is empty"), "{told:?}");
}

#[test]
fn what_lies_in_a_root_is_taken_unless_it_is_excluded() {
    let (tree, beside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::create_dir(tree.path().join("region")).unwrap();
    symlink(tree.path(), beside.path().join("link")).unwrap();
    let all = options(&[tree.path()]);
    assert!(all.take(&tree.path().join("region")) && all.take(&beside.path().join("link/region")));
    assert!(!all.take(beside.path()));
    let but = Options { exclude: vec![Pattern::parse("region").unwrap()], ..all };
    assert!(!but.take(&tree.path().join("region")) && but.take(tree.path()));
}

#[test]
fn a_missing_root_is_an_error() {
    let tree = tempfile::tempdir().unwrap();
    let missing = tree.path().join("missing");
    let error = pack::pack(&options(&[&missing]), &mut Vec::new()).unwrap_err();
    assert!(error.message().contains("missing"), "{error}");
}

/// Writes to a file under the reader's hands, while the archive is on its way.
struct Meddling<F: FnMut()> {
    archive: Vec<u8>,
    meddle: F,
}

impl<F: FnMut()> Write for Meddling<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (self.meddle)();
        self.archive.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn files_that_change_under_the_reader_never_break_the_archive() {
    for (name, words) in [("shrink", "shrank from 4000000"), ("grow", "grew by 4000000"), ("vanish", "vanished before")]
    {
        let tree = tempfile::tempdir().unwrap();
        let (file, behind) = (tree.path().join("a"), tree.path().join("b"));
        write(&file, &vec![1; 4_000_000]);
        write(&behind, b"behind");
        let mut calls = 0;
        let meddle = || {
            calls += 1;
            match (name, calls) {
                // The first bytes of the file are on their way.
                ("shrink", 6) => fs::File::options().write(true).open(&file).unwrap().set_len(2_000_000).unwrap(),
                ("grow", 6) => {
                    fs::File::options().append(true).open(&file).unwrap().write_all(&vec![2; 4_000_000]).unwrap()
                }
                ("vanish", 6) => fs::remove_file(&behind).unwrap(),
                _ => {}
            }
        };
        let mut out = Meddling { archive: Vec::new(), meddle };
        let (_, told) = pack::pack(&options(&[tree.path()]), &mut out).unwrap();
        assert!(told.notes.len() == 1 && told.notes[0].contains(words), "{name}: {told:?}");
        let (back, _) = restored(&out.archive);
        let back = back.path().join(tree.path().strip_prefix("/").unwrap());
        assert_eq!(fs::metadata(back.join("a")).unwrap().len(), 4_000_000);
        assert_eq!(back.join("b").exists(), name != "vanish");
    }
}

fn plain(path: &[u8], kind: Kind) -> Entry {
    Entry {
        path: path.to_vec(),
        kind,
        mode: 0o644,
        owner: (0, 0),
        owner_names: (Vec::new(), Vec::new()),
        modified: (0, 0),
        attributes: Vec::new(),
    }
}

fn archive_of(entries: &[Entry]) -> Vec<u8> {
    let mut archive = Vec::new();
    for entry in entries {
        entry.write_head(&mut archive).unwrap();
        let contents = usize::try_from(entry.contents()).unwrap();
        archive.resize(archive.len() + contents + padding(contents as u64), b'!');
    }
    write_end(&mut archive).unwrap();
    archive
}

#[test]
fn a_hostile_archive_writes_nothing_beside_its_directory() {
    let file = || Kind::File { size: 4, data: None };
    let link = |to: &str| Kind::Symlink(to.as_bytes().to_vec());
    let outer = tempfile::tempdir().unwrap();
    let outside = outer.path().join("outside");
    fs::create_dir(&outside).unwrap();
    write(&outside.join("kept"), b"kept");
    let away = outside.display().to_string();
    let sparse = |runs: &[(u64, u64)]| Kind::File { size: 8192, data: Some(runs.to_vec()) };
    let cases: Vec<Vec<Entry>> = vec![
        vec![plain(b"../outside/x", file())],
        vec![plain(b"a/../../outside/x", file())],
        vec![plain(outside.join("x").as_os_str().as_bytes(), file())],
        vec![plain(b"", file())],
        vec![plain(b"a//b", file())],
        vec![plain(b"./x", file())],
        vec![plain(b"..", Kind::Directory)],
        vec![plain(b"door", link(&away)), plain(b"door/x", file())],
        vec![plain(b"door", link("../outside")), plain(b"door/x", Kind::Directory)],
        vec![plain(b"a", Kind::Directory), plain(b"a/door", link("../../outside")), plain(b"a/door/x", link("y"))],
        vec![plain(b"door", link(&away)), plain(b"door", Kind::Directory), plain(b"door/x", file())],
        vec![plain(b"door", link(&format!("{away}/kept"))), plain(b"door", file())],
        vec![plain(b"x", Kind::Hardlink(b"../outside/kept".to_vec()))],
        vec![plain(b"x", Kind::Hardlink(outside.join("kept").as_os_str().as_bytes().to_vec()))],
        vec![plain(b"door", link(&away)), plain(b"x", Kind::Hardlink(b"door/kept".to_vec()))],
        vec![plain(b"twice", file()), plain(b"twice", file())],
        vec![plain(b"s", sparse(&[(4096, 4096), (0, 4096)]))],
        vec![plain(b"s", sparse(&[(4096, 8192)]))],
        vec![plain(b"s", sparse(&[(u64::MAX - 4, 512)]))],
    ];
    for (number, entries) in cases.iter().enumerate() {
        let inside = outer.path().join(format!("inside{number}"));
        fs::create_dir(&inside).unwrap();
        let error = unpack(&mut &archive_of(entries)[..], &inside).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Failed), "{number}: {error}");
        let left: Vec<_> = fs::read_dir(&outside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!((left.len(), fs::read(outside.join("kept")).unwrap()), (1, b"kept".to_vec()), "{number}");
    }
}

#[test]
fn half_an_archive_is_an_error_wherever_it_ends() {
    let file = plain(b"a/b", Kind::File { size: 700, data: None });
    let mut long = plain(&[b'n'; 180], Kind::File { size: 8192, data: Some(vec![(512, 1024)]) });
    long.attributes.push((b"user.x".to_vec(), vec![1; 900]));
    let whole = archive_of(&[file, long]);
    for length in (0..whole.len()).step_by(61) {
        let out = tempfile::tempdir().unwrap();
        assert!(unpack(&mut &whole[..length], out.path()).is_err(), "{length} of {}", whole.len());
    }
    let out = tempfile::tempdir().unwrap();
    unpack(&mut &whole[..], out.path()).unwrap();
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    let byte = any::<u8>().prop_filter("not in a name", |byte| *byte != 0 && *byte != b'/');
    prop_oneof![
        prop::collection::vec(byte, 1..30),
        prop::collection::vec(prop_oneof![Just(b'n'), Just(0xff), Just(b'\n'), Just(b'=')], 95..260),
    ]
}

fn kind() -> impl Strategy<Value = Kind> {
    let runs = prop::collection::vec((1u64..9, 1u64..9), 0..40).prop_map(|steps| {
        let mut at = 0;
        let run = |(gap, length): (u64, u64)| {
            let run = (at + gap * 512, length * 512);
            at = run.0 + run.1;
            run
        };
        let runs: Vec<_> = steps.into_iter().map(run).collect();
        Kind::File { size: at + 700, data: Some(runs) }
    });
    prop_oneof![
        any::<u64>().prop_map(|size| Kind::File { size: size >> 2, data: None }),
        runs,
        Just(Kind::Directory),
        name().prop_map(Kind::Symlink),
        name().prop_map(Kind::Hardlink),
        Just(Kind::Fifo),
        (any::<bool>(), 0u32..4096, 0u32..1_000_000)
            .prop_map(|(character, major, minor)| Kind::Device { character, numbers: (major, minor) }),
    ]
}

proptest! {
    #[test]
    fn heads_read_back(
        (path, kind, mode, owner) in (name(), kind(), 0u32..0o10000, any::<(u32, u32)>()),
        modified in (-5_000_000_000i64..50_000_000_000, 0u32..1_000_000_000),
        (user, group) in (prop::collection::vec(1u8..=255, 0..60), prop::collection::vec(1u8..=255, 0..60)),
        attributes in prop::collection::vec((name(), prop::collection::vec(any::<u8>(), 0..300)), 0..4),
    ) {
        let entry = Entry { path, kind, mode, owner, owner_names: (user, group), modified, attributes };
        let mut bytes = Vec::new();
        entry.write_head(&mut bytes).unwrap();
        let mut rest = bytes.as_slice();
        prop_assert_eq!(Entry::read_head(&mut rest).unwrap(), Some(entry));
        prop_assert!(rest.is_empty());
    }
}
