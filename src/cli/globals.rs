//! Options of every verb: where the repository is, what opens it, how to talk.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{ArgAction, ArgMatches, Args, ValueEnum};

use crate::config::{self, KmsEndpoint, RepoArg, Secret, Settings};
use crate::model::{Error, Result, SignerId};
use crate::observe::log;

/// Where a configuration is looked for when none is named.
const DEFAULT_FILES: [&str; 2] = ["drctl.toml", "/etc/drctl/drctl.toml"];

/// The options.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Everywhere")]
pub struct Globals {
    /// The configuration file [default: ./drctl.toml, then /etc/drctl/drctl.toml]
    #[arg(long, global = true, value_name = "FILE", env = "DRCTL_CONFIG", hide_env_values = true)]
    pub config: Option<PathBuf>,
    /// Print one JSON value instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// A region of the repository, instead of a configuration: s3://bucket/prefix or a directory. Repeats
    #[arg(long, global = true, value_name = "URL")]
    repo: Vec<String>,
    /// The S3 server of the --repo before it
    #[arg(long, global = true, value_name = "URL")]
    endpoint: Vec<String>,
    /// The AWS region of the --repo before it
    #[arg(long, global = true, value_name = "REGION")]
    s3_region: Vec<String>,
    /// Put the bucket of the --repo before it into the path
    #[arg(long, global = true, action = ArgAction::Append, num_args = 0, default_missing_value = "true")]
    path_style: Vec<bool>,
    /// A file with an age identity that opens keysets. Repeats
    #[arg(long, global = true, value_name = "FILE")]
    age_identity: Vec<PathBuf>,
    /// The KMS server of an AWS region. Repeats
    #[arg(long, global = true, value_name = "REGION=URL", value_parser = kms_endpoint)]
    kms_endpoint: Vec<KmsEndpoint>,
    /// The fingerprint of a signer to trust; with one, all others are refused. Repeats
    #[arg(long, global = true, value_name = "FINGERPRINT")]
    trust_signer: Vec<SignerId>,
    /// What to log on stderr: error, warn, info, debug, trace, or directives as in RUST_LOG
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// How log lines look: text or json
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text", hide_possible_values = true)]
    pub log_format: LogFormat,
    /// `repo` with the options that follow each.
    #[arg(skip)]
    repositories: Vec<RepoArg>,
    /// Whether `config` stands on the command line, and not only in the environment.
    #[arg(skip)]
    config_named: bool,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// A line of text per event.
    #[default]
    Text,
    /// A JSON object per line.
    Json,
}

impl From<LogFormat> for log::Format {
    fn from(format: LogFormat) -> Self {
        match format {
            LogFormat::Text => Self::Text,
            LogFormat::Json => Self::Json,
        }
    }
}

/// Options that repeat. clap gives a verb only those behind it when some stand before and some behind; a `--repo` that
/// is silently dropped would be a region that is silently not read.
const REPEATED: [(&str, bool); 7] = [
    ("--repo", true),
    ("--endpoint", true),
    ("--s3-region", true),
    ("--path-style", false),
    ("--age-identity", true),
    ("--kms-endpoint", true),
    ("--trust-signer", true),
];

/// The arguments with every option of [`REPEATED`] moved before the verb, in their order.
pub(super) fn hoist(arguments: &[OsString]) -> Vec<OsString> {
    let mut rest = arguments.iter();
    let mut hoisted: Vec<_> = rest.next().into_iter().cloned().collect();
    let mut others = Vec::new();
    while let Some(argument) = rest.next() {
        if argument == "--" {
            others.push(argument.clone());
            others.extend(rest.cloned());
            break;
        }
        match repeated(argument) {
            None => others.push(argument.clone()),
            Some(false) => hoisted.push(argument.clone()),
            // Without its value it stays where it is: at the front it would swallow the verb.
            Some(true) => match rest.next() {
                None => others.push(argument.clone()),
                Some(value) => hoisted.extend([argument.clone(), value.clone()]),
            },
        }
    }
    hoisted.append(&mut others);
    hoisted
}

/// Whether an argument is one of [`REPEATED`], and whether the next argument is its value.
fn repeated(argument: &OsStr) -> Option<bool> {
    let bytes = argument.as_encoded_bytes();
    REPEATED.iter().find_map(|(name, takes_value)| match bytes.strip_prefix(name.as_bytes())? {
        [] => Some(*takes_value),
        [b'=', ..] => Some(false),
        _ => None,
    })
}

impl Globals {
    /// Gives each `--repo` the options that follow it.
    pub(super) fn pair_repositories(&mut self, matches: &ArgMatches) -> Result<()> {
        let indices = |id: &str| matches.indices_of(id).into_iter().flatten();
        let mut options: Vec<(usize, Given<'_>)> = Vec::new();
        options.extend(indices("repo").zip(self.repo.iter().map(Given::Repo)));
        options.extend(indices("endpoint").zip(self.endpoint.iter().map(Given::Endpoint)));
        options.extend(indices("s3_region").zip(self.s3_region.iter().map(Given::Region)));
        options.extend(indices("path_style").zip(self.path_style.iter().map(|_| Given::PathStyle)));
        options.sort_by_key(|(index, _)| *index);

        let mut repositories: Vec<RepoArg> = Vec::new();
        for (_, option) in options {
            let repository = repositories.last_mut();
            match (option, repository) {
                (Given::Repo(url), _) => repositories.push(RepoArg { url: url.clone(), ..RepoArg::default() }),
                (Given::Endpoint(url), Some(repository)) => set("--endpoint", &mut repository.endpoint, url)?,
                (Given::Region(region), Some(repository)) => set("--s3-region", &mut repository.aws_region, region)?,
                (Given::PathStyle, Some(repository)) => repository.path_style = true,
                (option, None) => {
                    return Err(Error::usage(format!("{} stands before every --repo", option.name()))
                        .hint("it applies to the --repo before it: --repo URL --endpoint URL"));
                }
            }
        }
        let named = matches.value_source("config") == Some(ValueSource::CommandLine);
        if named && !repositories.is_empty() {
            return Err(Error::usage("--config and --repo exclude each other").hint("leave one of them out"));
        }
        self.repositories = repositories;
        self.config_named = named;
        Ok(())
    }

    /// The options with which another command finds and opens the same repository.
    pub(super) fn words(&self) -> Vec<String> {
        let config = self.config.iter().filter(|_| self.config_named);
        let config = config.flat_map(|file| ["--config".to_owned(), file.display().to_string()]);
        let repositories = self.repositories.iter().flat_map(repository_words);
        let keys = self.age_identity.iter().map(|file| ("--age-identity", file.display().to_string()));
        let kms = self.kms_endpoint.iter();
        let kms = kms.map(|kms| ("--kms-endpoint", format!("{}={}", kms.aws_region, kms.endpoint)));
        let signers = self.trust_signer.iter().map(|signer| ("--trust-signer", signer.to_string()));
        let pairs = keys.chain(kms).chain(signers).flat_map(|(option, value)| [option.to_owned(), value]);
        config.chain(repositories).chain(pairs).collect()
    }

    /// The settings that the command line asks for.
    pub(super) fn settings(&self) -> Result<Settings> {
        let file = self.config.as_deref().filter(|file| !file.as_os_str().is_empty());
        let mut settings = match (self.repositories.as_slice(), file) {
            ([], Some(file)) => config::load(file)?,
            ([], None) => config::load(default_file()?)?,
            (repositories, _) => Settings::for_adhoc(repositories)?,
        };
        for identity in &self.age_identity {
            let path = std::path::absolute(identity)
                .map_err(|error| Error::usage("--age-identity names no file").because(error))?;
            settings.openers.age_identities.push(Secret::File(path));
        }
        settings.secrets().try_for_each(Secret::refuse_if_exposed)?;
        settings.openers.kms_endpoints.clone_from(&self.kms_endpoint);
        settings.repository.signers.extend(self.trust_signer.iter().cloned());
        Ok(settings)
    }
}

fn repository_words(repository: &RepoArg) -> Vec<String> {
    let RepoArg { url, endpoint, aws_region, path_style } = repository;
    let mut words = vec!["--repo".to_owned(), url.clone()];
    words.extend(endpoint.iter().flat_map(|url| ["--endpoint".to_owned(), url.clone()]));
    words.extend(aws_region.iter().flat_map(|region| ["--s3-region".to_owned(), region.clone()]));
    words.extend(path_style.then(|| "--path-style".to_owned()));
    words
}

enum Given<'a> {
    Repo(&'a String),
    Endpoint(&'a String),
    Region(&'a String),
    PathStyle,
}

impl Given<'_> {
    const fn name(&self) -> &'static str {
        match self {
            Self::Repo(_) => "--repo",
            Self::Endpoint(_) => "--endpoint",
            Self::Region(_) => "--s3-region",
            Self::PathStyle => "--path-style",
        }
    }
}

fn set(name: &str, slot: &mut Option<String>, value: &str) -> Result<()> {
    match slot.replace(value.to_owned()) {
        None => Ok(()),
        Some(_) => Err(Error::usage(format!("{name} stands twice behind the same --repo"))),
    }
}

fn default_file() -> Result<&'static Path> {
    let found = DEFAULT_FILES.iter().map(Path::new).find(|path| path.exists());
    found.ok_or_else(|| {
        Error::usage("there is no configuration")
            .because(format!("neither ./{} nor {} exists", DEFAULT_FILES[0], DEFAULT_FILES[1]))
            .hint("`drctl init DIR` writes a first one; --config FILE names one, --repo URL does without")
    })
}

fn kms_endpoint(text: &str) -> Result<KmsEndpoint> {
    let pair = text.split_once('=').filter(|(region, url)| !region.is_empty() && url.contains("://"));
    let (region, url) = pair.ok_or_else(|| Error::usage("write REGION=URL, as in eu-west-1=http://127.0.0.1:4566"))?;
    Ok(KmsEndpoint { aws_region: region.to_owned(), endpoint: url.to_owned() })
}

#[cfg(test)]
mod tests {
    use clap::{Command, FromArgMatches};

    use super::*;

    fn globals(line: &str) -> Result<Globals> {
        let arguments: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        let verb = Command::new("restore").arg(clap::Arg::new("id")).arg(clap::Arg::new("to").long("to-name"));
        let command = Globals::augment_args(Command::new("drctl")).subcommand(verb);
        let matches =
            command.try_get_matches_from(hoist(&arguments)).map_err(|error| Error::usage(error.to_string()))?;
        let mut globals = Globals::from_arg_matches(&matches).unwrap();
        globals.pair_repositories(&matches)?;
        Ok(globals)
    }

    fn repo(url: &str, endpoint: Option<&str>, aws_region: Option<&str>, path_style: bool) -> RepoArg {
        let (endpoint, aws_region) = (endpoint.map(str::to_owned), aws_region.map(str::to_owned));
        RepoArg { url: url.to_owned(), endpoint, aws_region, path_style }
    }

    #[test]
    fn options_apply_to_the_repository_before_them_wherever_the_verb_stands() {
        let expected = [
            repo("s3://a", Some("http://a"), None, true),
            repo("s3://b", None, Some("eu-west-1"), false),
            repo("s3://c", Some("http://c"), None, true),
        ];
        let options = [
            "--repo s3://a --endpoint http://a --path-style",
            "--repo=s3://b --s3-region eu-west-1",
            "--repo s3://c --path-style --endpoint=http://c",
        ];
        for verb in 0..=options.len() {
            let (before, after) = options.split_at(verb);
            let line = format!("drctl {} restore ledger {}", before.join(" "), after.join(" "));
            assert_eq!(globals(&line).unwrap().repositories, expected, "{line}");
        }
    }

    #[test]
    fn the_words_for_the_next_command_mean_the_same() {
        let line = "drctl --repo s3://a --endpoint http://a --path-style restore ledger --repo s3://b --s3-region x \
                    --age-identity k --kms-endpoint x=http://k --json";
        let first = globals(line).unwrap();
        let next = format!("drctl restore ledger {}", first.words().join(" "));
        let second = globals(&next).unwrap();
        assert_eq!(second.repositories, first.repositories);
        assert_eq!((&second.age_identity, &second.kms_endpoint), (&first.age_identity, &first.kms_endpoint));
        assert_eq!(second.words(), first.words());
        assert_eq!(globals("drctl --config here.toml restore").unwrap().words(), ["--config", "here.toml"]);
    }

    #[test]
    fn repeated_options_on_both_sides_of_the_verb_all_count() {
        let found =
            globals("drctl --age-identity a restore ledger --age-identity b --kms-endpoint x=http://k").unwrap();
        assert_eq!(found.age_identity, [PathBuf::from("a"), PathBuf::from("b")]);
        assert_eq!(found.kms_endpoint[0].aws_region, "x");
    }

    #[test]
    fn an_option_that_belongs_to_no_repository_is_refused() {
        for line in [
            "drctl --endpoint http://a --repo s3://a restore",
            "drctl restore --path-style",
            "drctl --repo s3://a --endpoint http://a --endpoint http://b restore",
            "drctl --config x --repo s3://a restore",
            "drctl restore ledger --repo",
        ] {
            assert!(globals(line).is_err(), "{line}");
        }
        let missing = globals("drctl restore ledger --repo").unwrap_err();
        assert!(missing.message().contains("--repo"), "{missing}");
    }

    #[test]
    fn what_follows_two_dashes_is_left_alone() {
        let line: Vec<OsString> = ["drctl", "restore", "--", "--repo", "x"].map(OsString::from).into();
        assert_eq!(hoist(&line), line);
    }
}
