//! Floor 4, the configuration: text of `drctl.toml` in, [`Settings`] out.
//!
//! `file` reads TOML and knows lines and unknown keys, `resolve` knows what the keys mean and applies every default,
//! [`Settings`] is what the rest of drctl sees: typed, complete, with absolute paths. Secrets are references until the
//! moment of their use, so settings may be printed, logged and compared.
//!
//! Every key is described in `docs/configuration.md` and `docs/schedules.md`; tests compare.

mod conninfo;
mod daemon;
mod drill;
mod file;
mod initial;
mod notify;
mod place;
mod region;
mod resolve;
mod retention;
mod schedules;
mod secret;
mod settings;
mod show;
mod streamed;
mod target;
pub mod units;

pub use conninfo::without_password;
pub use daemon::Daemon;
pub use drill::{Assertion, Drill};
pub use initial::initial_text;
pub use notify::{DeadMan, Grafana, Notify, Occasion, Url, Webhook, WebhookFormat};
pub use place::{BucketPath, Place};
pub use resolve::{RepoArg, load, parse};
pub use retention::{Prune, Retention};
pub use schedules::{Mistake, Mistakes, load_schedules};
pub use secret::{Secret, SecretText};
pub use settings::{
    AwsAccess, Checksum, CompressionLevels, Credentials, Degrade, Detection, DumpTarget, FilesTarget, KmsEndpoint,
    KmsKey, LockMode, Method, ObjectLock, Objectives, OfflineKey, OnPressure, Openers, PostgresTarget, Region,
    Repository, S3Settings, Schedules, Settings, Source, Store, Target,
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    /// Asks the code for the keys of a section by giving it one that is like no other: the hint lists what it knows.
    fn known_keys(section: &str) -> BTreeSet<String> {
        let strange = "qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq = 1";
        let needed = match section {
            "regions.NAME" => "url = \"s3://bucket\"",
            "keys.NAME" => "age = \"age1qqq\"",
            "targets.NAME.retention" | "targets.NAME.retention files" => "",
            "targets.NAME.assertions.NAME" => "sql = \"SELECT 1\"",
            "targets.NAME" => "source = \"postgres\"\nconninfo = \"host=a\"",
            "targets.NAME files" => "source = \"files\"\nroots = [\"/a\"]",
            "targets.NAME dump" => "source = \"dump\"\nconninfo = \"host=a\"",
            _ => "",
        };
        let name = section.split(' ').next().unwrap_or_default();
        let header = if name.is_empty() { String::new() } else { format!("[{}]", name.replace("NAME", "n")) };
        let other = match section {
            _ if section.starts_with("regions") => "",
            "targets.NAME.retention files" => {
                "[regions.other]\nurl = \"/a\"\n[targets.n]\nsource = \"files\"\nroots = [\"/a\"]"
            }
            "targets.NAME.retention" | "targets.NAME.assertions.NAME" => {
                "[regions.other]\nurl = \"/a\"\n[targets.n]\nsource = \"postgres\"\nconninfo = \"host=a\""
            }
            _ => "[regions.other]\nurl = \"/a\"",
        };
        let text = format!("{header}\n{needed}\n{strange}\n{other}\n");
        let error = parse(&text, "drctl.toml", Path::new("/")).unwrap_err();
        let hint = error.hint_text().unwrap_or_default();
        let keys = hint.strip_prefix("known keys: ").unwrap_or_else(|| panic!("[{section}] {error}: {hint}"));
        keys.split(", ").map(str::to_owned).collect()
    }

    /// The keys that the documentation describes: the first column of the table under each `## [section]` heading. Where a
    /// section has several kinds, the kind stands behind it, as in `[targets.NAME]`: `files`.
    fn described_keys(document: &str) -> Vec<(String, BTreeSet<String>)> {
        let mut sections = Vec::new();
        for line in document.lines() {
            if let Some(heading) = line.strip_prefix("## ") {
                let section = heading.strip_prefix("`[").and_then(|rest| rest.strip_suffix('`'));
                let section = section.unwrap_or_default().replace("]`: `", " ");
                sections.push((section.strip_suffix(']').unwrap_or(&section).to_owned(), BTreeSet::new()));
            }
            let key = line.strip_prefix("| `").and_then(|rest| rest.split_once('`'));
            if let (Some((key, _)), Some((_, keys))) = (key, sections.last_mut()) {
                keys.insert(key.to_owned());
            }
        }
        sections.retain(|(_, keys)| !keys.is_empty());
        sections
    }

    #[test]
    fn the_documentation_describes_every_key_and_no_other() {
        let document = include_str!("../../docs/configuration.md");
        let described = described_keys(document);
        for (section, keys) in &described {
            assert_eq!(&known_keys(section), keys, "[{section}] in docs/configuration.md");
        }
        let sections: BTreeSet<_> = described.iter().map(|(section, _)| section.as_str()).collect();
        let tables = [
            "",
            "repository",
            "repository.degrade",
            "repository.compression_level",
            "regions.NAME",
            "regions.NAME.lock",
            "regions.NAME.kms",
            "regions.NAME.credentials",
            "regions.NAME.credentials.write",
            "keys.NAME",
            "targets.NAME",
            "targets.NAME dump",
            "targets.NAME files",
            "targets.NAME.assertions.NAME",
            "targets.NAME.retention",
            "targets.NAME.retention files",
            "prune",
            "drill",
            "schedules",
            "daemon",
            "grafana",
            "notify",
            "notify.webhook",
            "notify.dead_man",
        ];
        assert_eq!(sections, BTreeSet::from(tables));
    }

    #[test]
    fn the_examples_of_the_documentation_are_valid() {
        let document = include_str!("../../docs/configuration.md");
        let examples: Vec<_> =
            document.split("```toml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
        assert!(!examples.is_empty());
        for example in examples {
            parse(example, "the example", Path::new("/etc/drctl")).unwrap();
        }
    }
}
