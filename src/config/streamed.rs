//! `[targets.NAME]` of what is read as streams: `source = "files"` and `source = "dump"`.

use std::path::{Component, Path, PathBuf};

use crate::config::conninfo::without_password;
use crate::config::file::Section;
use crate::config::settings::{DumpTarget, FilesTarget};
use crate::model::pattern::Pattern;
use crate::model::{Error, Result};

pub(super) fn files(section: &Section<'_>) -> Result<FilesTarget> {
    // Rebuilt from its parts: a slash at the end would become the name of an entry that nothing unpacks.
    let plain = |root: &str| Path::new(root).components().collect::<PathBuf>();
    let roots: Vec<_> = section.strings("roots")?.into_iter().map(plain).collect();
    if roots.is_empty() {
        return Err(section.missing("roots"));
    }
    check_roots(&roots).map_err(|error| section.wrong("roots", &error))?;
    Ok(FilesTarget { roots, include: patterns(section, "include")?, exclude: patterns(section, "exclude")? })
}

fn patterns(section: &Section<'_>, key: &'static str) -> Result<Vec<Pattern>> {
    let parsed = section.strings(key)?.into_iter().map(Pattern::parse).collect::<Result<_>>();
    parsed.map_err(|error| section.wrong(key, &error))
}

/// Twice the same file in an archive could not be restored, and the whole machine holds `/proc`.
fn check_roots(roots: &[PathBuf]) -> Result<()> {
    let plain = |root: &Path| root.is_absolute() && !root.components().any(|part| part == Component::ParentDir);
    for (index, root) in roots.iter().enumerate() {
        if !plain(root) || root.parent().is_none() {
            return Err(Error::usage(format!("`{}` is not a root", root.display()))
                .hint("name directories or files by their absolute paths, but not / as a whole"));
        }
        let twin = |(other, path): &(usize, &PathBuf)| *other != index && root.starts_with(path);
        if let Some((_, outer)) = roots.iter().enumerate().find(twin) {
            return Err(Error::usage(format!("`{}` lies in `{}`", root.display(), outer.display()))
                .hint("name the outer one alone"));
        }
    }
    Ok(())
}

pub(super) fn dump(section: &Section<'_>) -> Result<DumpTarget> {
    let conninfo = section.converted("conninfo", without_password)?;
    let list = |key| -> Result<Vec<String>> { Ok(section.strings(key)?.into_iter().map(str::to_owned).collect()) };
    let databases = list("databases")?;
    if let Some(twice) = databases.iter().enumerate().find(|(at, name)| databases[..*at].contains(name)) {
        return Err(section.wrong("databases", &Error::usage(format!("`{}` is named twice", twice.1))));
    }
    Ok(DumpTarget {
        conninfo: conninfo.ok_or_else(|| section.missing("conninfo"))?,
        password: section.secret("password")?,
        databases,
        globals: section.boolean("globals")?.unwrap_or(true),
        bin_dir: section.path("bin_dir")?,
        schemas: list("schemas")?,
        exclude_schemas: list("exclude_schemas")?,
        tables: list("tables")?,
        exclude_tables: list("exclude_tables")?,
        exclude_table_data: list("exclude_table_data")?,
        lock_wait_timeout: section.interval("lock_wait_timeout")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Settings, Source, parse};

    fn read(target: &str) -> Result<Settings> {
        let text = format!("[regions.a]\nurl = \"a\"\n[targets.t]\n{target}");
        parse(&text, "drctl.toml", Path::new("/etc/drctl"))
    }

    #[test]
    fn roots_are_absolute_and_none_lies_in_another() {
        for roots in [&["/"][..], &["etc"], &["/etc", "/etc/app"], &["/etc/../srv"], &["/etc", "/etc"]] {
            let roots: Vec<_> = roots.iter().map(PathBuf::from).collect();
            assert!(check_roots(&roots).is_err(), "{roots:?}");
        }
        check_roots(&["/etc".into(), "/etcx".into()]).unwrap();
    }

    #[test]
    fn a_root_has_one_spelling() {
        for root in ["/etc/", "//etc", "/./etc/."] {
            let files = read(&format!("source = \"files\"\nroots = [\"{root}\"]\n")).unwrap();
            let Source::Files(target) = &files.targets[0].source else { panic!("{files:?}") };
            assert_eq!(target.roots[0].as_os_str(), "/etc");
        }
    }

    #[test]
    fn each_source_has_keys_of_its_own() {
        let files = read("source = \"files\"\nroots = [\"/etc\"]\nexclude = [\"*.swp\"]\nrpo = \"1h\"\n").unwrap();
        let Source::Files(target) = &files.targets[0].source else { panic!("{files:?}") };
        assert_eq!((target.roots.len(), target.exclude[0].as_str()), (1, "*.swp"));
        let dump = read("source = \"dump\"\nconninfo = \"host=db user=d\"\ndatabases = [\"app\"]\n").unwrap();
        let Source::Dump(target) = &dump.targets[0].source else { panic!("{dump:?}") };
        assert!(target.globals && target.databases == ["app"]);
        for (text, expected) in [
            ("source = \"files\"\n", "has no `roots`"),
            ("source = \"files\"\nroots = [\"etc\"]\n", "`etc` is not a root"),
            ("source = \"files\"\nroots = [\"/etc\"]\ninclude = [\"a/\"]\n", "`a/` is not a pattern"),
            ("source = \"files\"\nroots = [\"/etc\"]\nslot = \"x\"\n", "unknown key `slot`"),
            ("source = \"dump\"\nconninfo = \"host=a password=hunter2\"\n", "a password must not stand"),
            ("source = \"dump\"\nconninfo = \"host=a\"\ndatabases = [\"x\", \"y\", \"x\"]\n", "`x` is named twice"),
            ("source = \"dump\"\nconninfo = \"host=a\"\nmethod = \"local\"\n", "unknown key `method`"),
        ] {
            let told = read(text).unwrap_err().to_string();
            assert!(told.contains(expected) && !told.contains("hunter2"), "{text}: {told}");
        }
    }
}
