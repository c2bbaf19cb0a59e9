//! FLOE read by three parties: the library, drctl's `seal`, and the Python decryptor that every region carries.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use drctl::codec::{Aad, SealingKey, SystemRng, Unit, open, seal};
use drctl::model::{KeysetId, RepositoryId};
use fast_floe::{Key, Parameters};

const VECTORS: &str = include_str!("floe-vectors.txt");
const VECTOR_AAD: &[u8] = b"This is AAD";
/// Debian's interpreter sees Debian's python3-cryptography; another one that comes first in PATH may not.
const PYTHON: &str = "/usr/bin/python3";

fn vectors() -> impl Iterator<Item = (&'static str, Vec<u8>, Vec<u8>)> {
    VECTORS.lines().filter(|line| !line.starts_with('#')).map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let [name, sealed, plain] = fields[..] else { panic!("{line}") };
        (name, hex::decode(sealed).unwrap(), hex::decode(plain).unwrap())
    })
}

fn python(script_args: &[&str], stdin: &[u8]) -> Output {
    let mut child = Command::new(PYTHON)
        .args(["-B"])
        .args(script_args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{PYTHON} does not start: {error}"));
    let mut input = child.stdin.take().unwrap();
    let bytes = stdin.to_vec();
    // A child that refuses early stops reading; its exit code tells, not the broken pipe.
    let writer = std::thread::spawn(move || drop(input.write_all(&bytes)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    let missing = String::from_utf8_lossy(&output.stderr).contains("ModuleNotFoundError");
    assert!(!missing, "install python3-cryptography: the decryptor needs it");
    output
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/escape/floe.py")
}

/// Runs the decryptor as an operator would.
fn floe_py(key: &[u8], aad: &[u8], sealed: &[u8]) -> Output {
    let directory = tempfile::tempdir().unwrap();
    let aad_file = directory.path().join("aad");
    std::fs::File::create(&aad_file).unwrap().write_all(aad).unwrap();
    python(&[script().to_str().unwrap(), &hex::encode(key), aad_file.to_str().unwrap()], sealed)
}

#[test]
fn the_library_opens_the_published_vectors() {
    let key = Key::from_bytes([0; 32]);
    // The library starts at segments of 64 bytes; the other vectors have 40 and are left to the Python decryptor.
    let known: Vec<_> = vectors().filter(|(name, ..)| name.ends_with("_64")).collect();
    assert_eq!(known.len(), 5);
    for (name, sealed, plain) in known {
        let opened = fast_floe::decrypt_with_parameters(&key, VECTOR_AAD, Parameters::SEGMENT_64_B, &sealed);
        assert_eq!(opened.as_deref(), Ok(plain.as_slice()), "{name}");
    }
}

#[test]
fn the_python_decryptor_opens_the_published_vectors() {
    assert_eq!(vectors().count(), 7);
    for (name, sealed, plain) in vectors() {
        let output = floe_py(&[0; 32], VECTOR_AAD, &sealed);
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.stdout, plain, "{name}");
    }
}

#[test]
fn the_python_decryptor_opens_what_drctl_seals() {
    let key = SealingKey::generate(&SystemRng).unwrap();
    let (repository, keyset) = (RepositoryId::new(&SystemRng).unwrap(), KeysetId::new(&SystemRng).unwrap());
    let aad = Aad { repository: &repository, keyset: &keyset, kind: Unit::Wal, id: "epoch/17" };
    for len in [0, 1, 70_000, 1_048_544, 1_048_545, 2_500_000] {
        let plain: Vec<u8> = (0..len).map(|i: u32| (i % 253) as u8).collect();
        let sealed = seal(&key, &aad, &plain).unwrap();
        let output = floe_py(key.expose(), &aad.to_bytes(), &sealed);
        assert!(output.status.success(), "{len}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stdout == plain, "{len}");
    }
}

#[test]
fn the_python_decryptor_writes_nothing_when_anything_is_wrong() {
    let key = SealingKey::generate(&SystemRng).unwrap();
    let (repository, keyset) = (RepositoryId::new(&SystemRng).unwrap(), KeysetId::new(&SystemRng).unwrap());
    let aad = Aad { repository: &repository, keyset: &keyset, kind: Unit::Part, id: "a" };
    let sealed = seal(&key, &aad, &vec![3; 1_500_000]).unwrap();
    let flip = |at: usize| {
        let mut bytes = sealed.clone();
        bytes[at] ^= 1;
        bytes
    };
    let other = Aad { kind: Unit::Map, ..aad }.to_bytes();
    for (what, output) in [
        ("key", floe_py(&[1; 32], &aad.to_bytes(), &sealed)),
        ("binding", floe_py(key.expose(), &other, &sealed)),
        ("header", floe_py(key.expose(), &aad.to_bytes(), &flip(5))),
        ("last bit", floe_py(key.expose(), &aad.to_bytes(), &flip(sealed.len() - 1))),
        ("cut in the last segment", floe_py(key.expose(), &aad.to_bytes(), &sealed[..sealed.len() - 1])),
        ("cut after a segment", floe_py(key.expose(), &aad.to_bytes(), &sealed[..74 + 1_048_576])),
        ("extended", floe_py(key.expose(), &aad.to_bytes(), &[&sealed[..], b"\0"].concat())),
        ("empty", floe_py(key.expose(), &aad.to_bytes(), b"")),
    ] {
        assert_eq!(output.status.code(), Some(1), "{what}");
        assert!(output.stdout.is_empty(), "{what}");
    }
}

/// The other direction: messages written by the specification's pseudocode in Python open in Rust.
#[test]
fn drctl_opens_what_python_seals() {
    const SEALER: &str = r#"
import os, struct, sys
sys.path.insert(0, sys.argv[1])
import floe
key, aad, plain = bytes.fromhex(sys.argv[2]), bytes.fromhex(sys.argv[3]), sys.stdin.buffer.read()
parameters, iv = floe.PARAMETERS.pack(0, 0, 1 << 20, 32), os.urandom(32)
kdf = lambda secret, purpose, length: floe.HKDFExpand(
    algorithm=floe.SHA384(), length=length, info=parameters + iv + purpose + aad).derive(secret)
out = parameters + iv + kdf(key, b"HEADER_TAG:", 32)
aes = floe.AESGCM(kdf(kdf(key, b"MESSAGE_KEY:", 48), b"DEK:" + bytes(8), 32))
size = (1 << 20) - 32
parts = [plain[at : at + size] for at in range(0, len(plain), size)] or [b""]
for position, part in enumerate(parts):
    final = position == len(parts) - 1
    nonce = os.urandom(12)
    prefix = struct.pack(">I", len(part) + 32 if final else 0xFFFFFFFF)
    out += prefix + nonce + aes.encrypt(nonce, part, struct.pack(">QB", position, final))
sys.stdout.buffer.write(out)
"#;
    let key = SealingKey::generate(&SystemRng).unwrap();
    let (repository, keyset) = (RepositoryId::new(&SystemRng).unwrap(), KeysetId::new(&SystemRng).unwrap());
    let aad = Aad { repository: &repository, keyset: &keyset, kind: Unit::Manifest, id: "ledger-261120-010059-k7f/0" };
    let directory = script().parent().unwrap().to_str().unwrap().to_owned();
    for len in [0, 5, 1_048_544, 3_000_000] {
        let plain: Vec<u8> = (0..len).map(|i: u32| (i % 241) as u8).collect();
        let arguments = ["-c", SEALER, &directory, &hex::encode(key.expose()), &hex::encode(aad.to_bytes())];
        let output = python(&arguments, &plain);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(open(&key, &aad, &output.stdout).unwrap() == plain, "{len}");
    }
}
