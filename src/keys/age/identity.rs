//! Identity files: the secret half of an age recipient.

use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use ::age::secrecy::ExposeSecret as _;
use ::age::x25519;
use chrono::{DateTime, SecondsFormat, Utc};
use zeroize::Zeroizing;

use crate::keys::KeyError;

/// An identity file is a few lines; a reader takes no more than this.
const MAX_FILE: usize = 64 * 1024;

/// An identity and the recipient that belongs to it.
pub(super) struct OwnIdentity {
    pub(super) identity: x25519::Identity,
    pub(super) recipient: String,
}

/// Draws a new identity. Returns the text of its file, with the comments of `age-keygen`, and the recipient. The file
/// belongs offline; age draws it from the operating system itself.
pub fn generate_identity(created: DateTime<Utc>) -> (Zeroizing<String>, String) {
    let identity = x25519::Identity::generate();
    let recipient = identity.to_public().to_string();
    let created = created.to_rfc3339_opts(SecondsFormat::Secs, true);
    let secret = identity.to_string();
    let text = format!("# created: {created}\n# public key: {recipient}\n{}\n", secret.expose_secret());
    (Zeroizing::new(text), recipient)
}

/// Every identity of one file.
pub(super) fn read_file(path: &Path) -> Result<Vec<OwnIdentity>, KeyError> {
    let name = path.display();
    let invalid = |reason: String| KeyError::Invalid { reason: format!("identity file {name}: {reason}") };
    let mut file = std::fs::File::open(path).map_err(|error| invalid(error.to_string()))?;
    let metadata = file.metadata().map_err(|error| invalid(error.to_string()))?;
    // A pipe (`<(…)`, /dev/stdin, /dev/fd/3) has no mode that says who may read what comes through it.
    if metadata.is_file() && metadata.mode() & 0o077 != 0 {
        let mode = metadata.mode() & 0o777;
        return Err(invalid(format!("others can read it (mode {mode:04o}); run: chmod 600 {name}")));
    }
    let text = read_bounded(&mut file).map_err(invalid)?;
    parse(&text).map_err(invalid)
}

fn read_bounded(file: &mut std::fs::File) -> Result<Zeroizing<String>, String> {
    // Reserved in full: a buffer that grows leaves copies of secrets behind that nobody wipes.
    let mut bytes = Zeroizing::new(vec![0; MAX_FILE + 1]);
    let mut len = 0;
    loop {
        match file.read(&mut bytes[len..]) {
            Ok(0) => break,
            Ok(read) => len += read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    if len > MAX_FILE {
        return Err(format!("it is longer than {MAX_FILE} bytes"));
    }
    let text = std::str::from_utf8(&bytes[..len])
        .map_err(|_| "it is not text; an encrypted file is opened with age first".to_owned())?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// Errors name lines by number: their text may be a secret with a typing error.
fn parse(text: &str) -> Result<Vec<OwnIdentity>, String> {
    if text.starts_with("age-encryption.org/") || text.starts_with("-----BEGIN AGE ENCRYPTED FILE-----") {
        return Err("it is encrypted with a passphrase; hand over <(age -d FILE) instead".to_owned());
    }
    let mut identities = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let identity: x25519::Identity = line.parse().map_err(|reason| {
            format!("line {} is not an identity of the form AGE-SECRET-KEY-1… ({reason})", number + 1)
        })?;
        identities.push(OwnIdentity { recipient: identity.to_public().to_string(), identity });
    }
    if identities.is_empty() { Err("it holds no identity".to_owned()) } else { Ok(identities) }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;

    use chrono::TimeZone as _;

    use super::*;

    fn write(mode: u32, text: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let mut options = std::fs::OpenOptions::new();
        let path = directory.path().join("key.txt");
        options.write(true).create_new(true).mode(mode).open(path).unwrap().write_all(text.as_bytes()).unwrap();
        directory
    }

    fn read(directory: &tempfile::TempDir) -> Result<Vec<OwnIdentity>, KeyError> {
        read_file(&directory.path().join("key.txt"))
    }

    fn refusal(directory: &tempfile::TempDir) -> String {
        match read(directory) {
            Ok(_) => panic!("it was taken"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_generated_file_reads_back() {
        let created = Utc.timestamp_opt(1_763_600_459, 0).unwrap();
        let (text, recipient) = generate_identity(created);
        let expected = format!("# created: 2025-11-20T01:00:59Z\n# public key: {recipient}\nAGE-SECRET-KEY-1");
        assert!(text.starts_with(&expected));
        let two = format!("{}\n  {}\r\n", *text, generate_identity(created).0.lines().last().unwrap());
        let identities = read(&write(0o600, &two)).unwrap();
        assert_eq!((identities.len(), &identities[0].recipient), (2, &recipient));
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let (text, _) = generate_identity(Utc.timestamp_opt(0, 0).unwrap());
        for mode in [0o640, 0o604, 0o660] {
            let said = refusal(&write(mode, &text));
            assert!(said.contains("others can read it") && said.contains("chmod 600"), "{said}");
        }
        for mode in [0o600, 0o400] {
            assert_eq!(read(&write(mode, &text)).unwrap().len(), 1);
        }
    }

    #[test]
    fn what_is_no_identity_is_named_by_its_line_only() {
        let said = refusal(&write(0o600, "# c\nAGE-SECRET-KEY-1OOPS\n"));
        assert!(said.contains("line 2") && !said.contains("OOPS"), "{said}");
        assert!(refusal(&write(0o600, "# nothing\n")).contains("no identity"));
        assert!(refusal(&write(0o600, "age-encryption.org/v1\n-> scrypt")).contains("passphrase"));
        assert!(refusal(&write(0o600, &"#".repeat(MAX_FILE + 1))).contains("longer"));
        assert!(read_file(Path::new("/nonexistent/key.txt")).is_err());
    }
}
