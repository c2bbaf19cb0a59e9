//! What the keys mean, and every default.

use std::fs;
use std::io::ErrorKind;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use crate::config::daemon::{Daemon, daemon};
use crate::config::drill::{Drill, drill};
use crate::config::file::{Document, Section};
use crate::config::notify::{Notify, grafana, notify};
use crate::config::place::Place;
use crate::config::region::{DEFAULT_TIMEOUT, chain_for_all, checked_endpoint, region};
use crate::config::retention::{Prune, prune};
use crate::config::secret::Secret;
use crate::config::settings::{
    Checksum, CompressionLevels, Degrade, OfflineKey, Openers, Region, Repository, S3Settings, Schedules, Settings,
    Store,
};
use crate::config::target::target;
use crate::model::{Error, Result};

const DEFAULT_SCHEDULES: &str = "schedules";
const DEFAULT_STATE_DIR: &str = "/var/lib/drctl";

/// A region named on the command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RepoArg {
    /// Its place, as in `url`.
    pub url: String,
    /// As in `endpoint`.
    pub endpoint: Option<String>,
    /// As in `aws_region`.
    pub aws_region: Option<String>,
    /// As in `path_style`.
    pub path_style: bool,
}

/// Reads a configuration file.
///
/// # Errors
/// It does not exist, is not TOML, has unknown keys or wrong values, or names a secret file that others can read.
pub fn load(path: &Path) -> Result<Settings> {
    let text = fs::read_to_string(path).map_err(|error| {
        let unreadable = Error::usage(format!("the configuration {} cannot be read", path.display())).because(&error);
        match error.kind() {
            ErrorKind::NotFound => unreadable.hint("`drctl init DIR` writes a first one; --config names another"),
            _ => unreadable,
        }
    })?;
    let absolute =
        std::path::absolute(path).map_err(|error| Error::failed("the working directory is unknown").because(error))?;
    let directory = absolute.parent().unwrap_or(Path::new("/"));
    let mut settings = parse(&text, &path.display().to_string(), directory)?;
    settings.file = Some(absolute.clone());
    settings.secrets().try_for_each(Secret::refuse_if_exposed)?;
    Ok(settings)
}

/// Reads the text of a configuration. `name` is its name in errors; relative paths are taken from `directory`.
///
/// # Errors
/// The text is not TOML, or has unknown keys or wrong values.
pub fn parse(text: &str, name: &str, directory: &Path) -> Result<Settings> {
    let document = Document::parse(name, directory, text)?;
    let root = document.root();
    let section = root.section("repository")?;
    let schedules = root.section("schedules")?;
    let regions = root.named("regions")?;
    let keys = root.named("keys")?;
    let targets = root.named("targets")?;
    let drills = root.section("drill")?;
    let (daemons, prunes) = (root.section("daemon")?, root.section("prune")?);
    let (grafanas, notices) = (root.section("grafana")?, root.section("notify")?);
    root.finish()?;
    if regions.is_empty() {
        return Err(Error::usage(format!("{name} names no region")).hint("add [regions.NAME] with a url"));
    }
    let regions = regions.iter().map(|(name, section)| region(name, section, directory)).collect::<Result<Vec<_>>>()?;
    refuse_twins(&regions)?;
    let repository = repository(&section, &regions)?;
    let schedules = schedule_folder(&schedules, directory)?;
    let keys = keys.iter().map(|(name, section)| offline_key(name, section)).collect::<Result<_>>()?;
    let targets = targets.iter().map(|(name, section)| target(name, section, &repository.state_dir));
    let targets = targets.collect::<Result<_>>()?;
    let drill = drill(&drills, &repository.state_dir)?;
    Ok(Settings {
        file: None,
        repository,
        schedules,
        regions,
        keys,
        targets,
        drill,
        prune: prune(&prunes)?,
        daemon: daemon(&daemons)?,
        grafana: grafana(&grafanas, directory)?,
        notify: notify(&notices, directory)?,
        openers: Openers::default(),
    })
}

impl Settings {
    /// Settings for regions named on the command line, without a file: `repo-1`, `repo-2` and so on. Relative paths are
    /// taken from the working directory.
    ///
    /// # Errors
    /// No region, or one whose place cannot be understood or is named twice.
    pub fn for_adhoc(repos: &[RepoArg]) -> Result<Self> {
        let directory = std::env::current_dir()
            .map_err(|error| Error::failed("the working directory is unknown").because(error))?;
        let regions = repos.iter().enumerate().map(|(index, repo)| adhoc_region(index + 1, repo, &directory));
        let regions = regions.collect::<Result<Vec<_>>>()?;
        if regions.is_empty() {
            return Err(Error::usage("no repository is named").hint("add --repo URL, or --config FILE"));
        }
        refuse_twins(&regions)?;
        let repository = Repository {
            write_quorum: majority(regions.len()),
            degrade: None,
            signers: Vec::new(),
            state_dir: PathBuf::from(DEFAULT_STATE_DIR),
            min_wraps: default_min_wraps(&regions),
            detach_after: None,
            pack_size: *PACK_SIZES.end(),
            compression_level: CompressionLevels { pages: 3, dumps: 3, wal: 1 },
        };
        Ok(Self {
            file: None,
            drill: Drill::below(&repository.state_dir),
            repository,
            schedules: Schedules { dir: directory.join(DEFAULT_SCHEDULES) },
            regions,
            keys: Vec::new(),
            targets: Vec::new(),
            prune: Prune::default(),
            daemon: Daemon::default(),
            grafana: None,
            notify: Notify::default(),
            openers: Openers::default(),
        })
    }
}

fn adhoc_region(number: usize, repo: &RepoArg, directory: &Path) -> Result<Region> {
    let RepoArg { url, endpoint, aws_region, path_style } = repo;
    let store = match Place::parse(url, directory)? {
        Place::Bucket(bucket) => Store::S3(Box::new(S3Settings {
            bucket,
            endpoint: endpoint.as_deref().map(checked_endpoint).transpose()?,
            aws_region: aws_region.clone(),
            path_style: *path_style,
            single_writer: false,
            checksum: Checksum::WhenSupported,
            timeout: DEFAULT_TIMEOUT,
            lock: None,
            credentials: chain_for_all(),
        })),
        Place::Directory(_) if endpoint.is_some() || aws_region.is_some() || *path_style => {
            let message = format!("--endpoint, --s3-region and --path-style mean nothing for the directory {url}");
            return Err(Error::usage(message).hint("they belong to the --repo before them"));
        }
        Place::Directory(path) => Store::Directory { path },
    };
    Ok(Region { name: format!("repo-{number}").parse()?, store, kms: None })
}

const fn majority(regions: usize) -> usize {
    regions / 2 + 1
}

fn default_min_wraps(regions: &[Region]) -> usize {
    let directories_only = regions.iter().all(|region| matches!(region.store, Store::Directory { .. }));
    if directories_only { 1 } else { 2 }
}

/// Two regions in one place would count twice toward the quorum and be lost together.
fn refuse_twins(regions: &[Region]) -> Result<()> {
    let server = |region: &Region| match &region.store {
        Store::S3(s3) => s3.endpoint.clone(),
        Store::Directory { .. } => None,
    };
    for (index, region) in regions.iter().enumerate() {
        let twin = |other: &&Region| other.place() == region.place() && server(other) == server(region);
        if let Some(twin) = regions.iter().take(index).find(twin) {
            return Err(Error::usage(format!("regions {} and {} are the same place", twin.name, region.name))
                .because(region.place()));
        }
    }
    Ok(())
}

fn repository(section: &Section<'_>, regions: &[Region]) -> Result<Repository> {
    let count = i32::try_from(regions.len()).unwrap_or(i32::MAX);
    let write_quorum = section.integer("write_quorum", 1..=count)?.map_or(majority(regions.len()), to_usize);
    let repository = Repository {
        write_quorum,
        degrade: degrade(&section.section("degrade")?, write_quorum)?,
        signers: section
            .strings("signers")?
            .into_iter()
            .map(str::parse)
            .collect::<Result<_>>()
            .map_err(|error| section.wrong("signers", &error))?,
        state_dir: section.path("state_dir")?.unwrap_or_else(|| PathBuf::from(DEFAULT_STATE_DIR)),
        detach_after: section.interval("detach_after")?,
        min_wraps: section.integer("min_wraps", 1..=100)?.map_or_else(|| default_min_wraps(regions), to_usize),
        pack_size: pack_size(section)?,
        compression_level: compression_levels(&section.section("compression_level")?)?,
    };
    section.finish()?;
    Ok(repository)
}

/// An object of the repository has at most 16 MiB. Below 256 KiB not every frame would fit a pack.
const PACK_SIZES: RangeInclusive<usize> = 256 * 1024..=16 * 1024 * 1024;

fn pack_size(section: &Section<'_>) -> Result<usize> {
    let Some(bytes) = section.size("pack_size")? else { return Ok(*PACK_SIZES.end()) };
    let fits = usize::try_from(bytes).ok().filter(|bytes| PACK_SIZES.contains(bytes));
    fits.ok_or_else(|| section.wrong("pack_size", &Error::usage("it must be from 256KiB to 16MiB")))
}

fn schedule_folder(section: &Section<'_>, directory: &Path) -> Result<Schedules> {
    let dir = section.path("dir")?.unwrap_or_else(|| directory.join(DEFAULT_SCHEDULES));
    section.finish()?;
    Ok(Schedules { dir })
}

/// For numbers whose range excludes negative ones.
fn to_usize(number: i32) -> usize {
    usize::try_from(number).unwrap_or(0)
}

fn degrade(section: &Section<'_>, write_quorum: usize) -> Result<Option<Degrade>> {
    let below = i32::try_from(write_quorum).unwrap_or(i32::MAX) - 1;
    let to = section.integer("to", 1..=below)?;
    let after = section.duration("after")?;
    section.finish()?;
    if !section.is_present() {
        return Ok(None);
    }
    let to = to_usize(to.ok_or_else(|| section.missing("to"))?);
    Ok(Some(Degrade { to, after: after.ok_or_else(|| section.missing("after"))? }))
}

fn compression_levels(section: &Section<'_>) -> Result<CompressionLevels> {
    let level = |key, default| Ok::<_, Error>(section.integer(key, 1..=19)?.unwrap_or(default));
    let levels = CompressionLevels { pages: level("pages", 3)?, dumps: level("dumps", 3)?, wal: level("wal", 1)? };
    section.finish()?;
    Ok(levels)
}

fn offline_key(name: &str, section: &Section<'_>) -> Result<OfflineKey> {
    let recipient = section.converted("age", |text| {
        let fits = text.strip_prefix("age1").is_some_and(|rest| rest.bytes().all(|b| b.is_ascii_alphanumeric()));
        let secret = text.to_ascii_uppercase().starts_with("AGE-SECRET-KEY");
        match (fits, secret) {
            (true, _) => Ok(text.to_owned()),
            (_, true) => Err(Error::usage("it is an identity, which must not stand in the configuration")
                .hint("write its recipient, age1…, and keep the identity in a file (identity = \"file:…\")")),
            _ => Err(Error::usage("it is not an age recipient").hint("a recipient begins with age1")),
        }
    })?;
    let identity = section.secret("identity")?;
    section.finish()?;
    let recipient = recipient.ok_or_else(|| section.missing("age"))?;
    Ok(OfflineKey { name: name.to_owned(), recipient, identity })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{AwsAccess, Source};

    fn read(text: &str) -> Result<Settings> {
        parse(text, "drctl.toml", Path::new("/etc/drctl"))
    }

    fn told(text: &str) -> String {
        let error = read(text).unwrap_err();
        format!("{error} / {}", error.hint_text().unwrap_or("-"))
    }

    #[test]
    fn the_smallest_file_gets_every_default() {
        let settings = read("[regions.a]\nurl = \"a\"\n").unwrap();
        let repository = &settings.repository;
        assert_eq!((repository.write_quorum, repository.lowest_quorum(), repository.min_wraps), (1, 1, 1));
        assert_eq!(repository.state_dir, Path::new("/var/lib/drctl"));
        assert_eq!(settings.regions[0].place().to_string(), "dir:///etc/drctl/a");
    }

    #[test]
    fn the_quorum_is_a_majority() {
        for (regions, quorum) in [(1, 1), (2, 2), (3, 2), (4, 3), (5, 3)] {
            let text: String = (0..regions).map(|n| format!("[regions.r{n}]\nurl = \"r{n}\"\n")).collect();
            assert_eq!(read(&text).unwrap().repository.write_quorum, quorum);
        }
    }

    #[test]
    fn regions_keep_the_order_of_the_file() {
        let text = "[regions.zz]\nurl = \"z\"\n[regions.aa]\nurl = \"a\"\n[regions.mm]\nurl = \"s3://m\"\n";
        let settings = read(text).unwrap();
        let names: Vec<_> = settings.regions.iter().map(|region| region.name.as_str()).collect();
        assert_eq!(names, ["zz", "aa", "mm"]);
        assert_eq!(settings.repository.min_wraps, 2);
    }

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        let region = "[regions.a]\nurl = \"s3://bucket\"\n";
        let cases = [
            ("", "drctl.toml names no region"),
            ("[regions.A]\nurl = \"x\"", "[regions.A] of drctl.toml is wrong: line 1: `A` is not a region name"),
            ("[regions.a]\n", "[regions.a] of drctl.toml has no `url`"),
            ("[region.a]\nurl = \"x\"", "unknown key `region` in drctl.toml: line 1 / did you mean `regions`?"),
            ("[regions.a]\nurl = \"x\"\nendpoint = \"http://h\"", "line 3: it means nothing for a directory"),
            ("[regions.a]\nurl = \"x\"\n[regions.b]\nurl = \"/etc/drctl/x\"", "regions a and b are the same place"),
            (&format!("[repository]\nwrite_quorum = 2\n{region}"), "expected a whole number from 1 to 1, found 2"),
            (&format!("{region}endpoint = \"http://user:hunter2@h\""), "a URL must not carry credentials"),
            (&format!("{region}credentials.write = {{ access_key_id = \"env:ID\" }}"), "has no `secret_access_key`"),
            (&format!("[repository]\npack_size = \"17MiB\"\n{region}"), "line 2: it must be from 256KiB to 16MiB"),
            (&format!("{region}kms.key = \"alias/drctl\""), "[regions.a.kms] of drctl.toml has no `aws_region`"),
            (&format!("{region}[targets.latest]\nsource = \"postgres\""), "`latest` is not a target name"),
            (&format!("{region}[targets.l]\nsource = \"postgre\""), "use postgres or dump or files"),
            (&format!("{region}[targets.l]\nsource = \"postgres\"\nconninfo = \"\"\nrpo = \"0s\""), "longer than 0s"),
            (&format!("{region}[keys.r]\nage = \"AGE-SECRET-KEY-1XX\""), "it is an identity"),
        ];
        for (text, expected) in cases {
            let told = told(text);
            assert!(told.contains(expected), "{text}\n{told}");
            assert!(!told.contains("hunter2") && !told.contains("SECRET-KEY-1XX"), "{told}");
        }
    }

    #[test]
    fn a_literal_secret_is_refused_and_not_repeated() {
        let text = "[regions.a]\nurl = \"s3://b\"\n[regions.a.credentials.write]\naccess_key_id = \"env:ID\"\n\
                    secret_access_key = \"hunter2\"\n";
        let told = told(text);
        assert!(told.contains("`secret_access_key` in [regions.a.credentials.write]"), "{told}");
        assert!(told.contains("env:VARIABLE") && !told.contains("hunter2"), "{told}");
    }

    #[test]
    fn an_arn_names_the_region_of_its_key() {
        let text = "[regions.a]\nurl = \"x\"\nkms.key = \"arn:aws:kms:eu-west-1:1:key/k\"\n";
        assert_eq!(read(text).unwrap().regions[0].kms.as_ref().unwrap().aws_region, "eu-west-1");
    }

    #[test]
    fn roles_left_out_use_the_chain() {
        let text = "[regions.a]\nurl = \"s3://b\"\ncredentials.prune = { profile = \"prune\" }\n";
        let settings = read(text).unwrap();
        let Store::S3(s3) = &settings.regions[0].store else { panic!("not a bucket") };
        assert_eq!(s3.credentials.write, AwsAccess::Chain);
        assert_eq!(s3.credentials.prune, AwsAccess::Profile { profile: "prune".into() });
    }

    #[test]
    fn a_loaded_file_anchors_its_paths_and_refuses_open_secrets() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("drctl.toml");
        let identity = directory.path().join("recovery.age");
        let place = |path: &Path, text: &str, mode: u32| {
            use std::os::unix::fs::PermissionsExt;
            std::io::Write::write_all(&mut fs::File::create(path).unwrap(), text.as_bytes()).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        place(&path, &format!("{}\n{TARGET}", crate::config::initial_text("age1qqq")), 0o644);
        place(&identity, "AGE-SECRET-KEY-1\n", 0o600);
        let settings = load(&path).unwrap();
        assert_eq!(settings.file.as_deref(), Some(path.as_path()));
        assert_eq!(settings.repository.state_dir, directory.path().join("state"));
        let source = &settings.target(&"ledger".parse().unwrap()).unwrap().source;
        let Source::Postgres(postgres) = source else { panic!("{source:?}") };
        assert_eq!(postgres.control_socket, directory.path().join("state/ledger.sock"));

        place(&identity, "AGE-SECRET-KEY-1\n", 0o644);
        let error = load(&path).unwrap_err();
        assert_eq!(error.hint_text(), Some(format!("chmod 600 {}", identity.display()).as_str()));
        assert!(load(Path::new("/nonexistent/drctl.toml")).unwrap_err().hint_text().unwrap().contains("init"));
    }

    const TARGET: &str = "[targets.ledger]\nsource = \"postgres\"\nconninfo = \"host=/run/postgresql\"\n";

    #[test]
    fn a_wrong_name_gets_the_nearest_one() {
        let settings = read(&format!("[regions.us-east-1]\nurl = \"a\"\n{TARGET}")).unwrap();
        let hint = |error: Error| error.hint_text().unwrap_or_default().to_owned();
        assert_eq!(hint(settings.target(&"leger".parse().unwrap()).unwrap_err()), "did you mean `ledger`?");
        assert_eq!(hint(settings.region(&"us-west-1".parse().unwrap()).unwrap_err()), "did you mean `us-east-1`?");
        assert_eq!(hint(settings.target(&"orders".parse().unwrap()).unwrap_err()), "there are: ledger");
    }

    #[test]
    fn regions_from_the_command_line_need_no_file() {
        let bucket = RepoArg { url: "s3://b/p".into(), path_style: true, ..RepoArg::default() };
        let directory = RepoArg { url: "dir:///srv/a".into(), ..RepoArg::default() };
        let settings = Settings::for_adhoc(&[bucket.clone(), directory.clone()]).unwrap();
        let places: Vec<_> = settings.regions.iter().map(|region| region.place().to_string()).collect();
        assert_eq!(places, ["s3://b/p", "dir:///srv/a"]);
        assert_eq!(settings.repository.write_quorum, 2);
        assert!(Settings::for_adhoc(&[]).is_err());
        assert!(Settings::for_adhoc(&[bucket.clone(), bucket]).is_err());
        assert!(Settings::for_adhoc(&[RepoArg { path_style: true, ..directory }]).is_err());
    }
}
