//! The log: structured events on stderr, quiet unless something needs a person.

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::model::{Error, Result};

/// How log lines look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Format {
    /// One line of text per event.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

/// Installs the log for the whole process.
///
/// `directives` wins over `RUST_LOG`; without both, warnings and errors are shown. A bare level (`debug`) is meant for
/// drctl's own events: its libraries stay at `warn`, because their debug output buries everything else.
///
/// # Errors
/// The directives do not parse, or a log is installed already.
pub fn init(directives: Option<&str>, format: Format) -> Result<()> {
    init_with(directives, format, std::io::stderr)
}

/// [`init`] with another destination than stderr, for a terminal that must move its progress lines out of the way.
///
/// # Errors
/// As [`init`].
pub fn init_with<W>(directives: Option<&str>, format: Format, writer: W) -> Result<()>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let from_environment = std::env::var("RUST_LOG").ok().filter(|text| !text.trim().is_empty());
    let filter = filter(directives.or(from_environment.as_deref()).unwrap_or(quiet(format)))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    let installed = match format {
        Format::Text => log.with_target(false).with_ansi(false).try_init(),
        // Without the name of the module: events have a field `target` of their own.
        Format::Json => log.with_target(false).json().flatten_event(true).try_init(),
    };
    installed.map_err(|error| Error::failed("the log is installed already").because(error))
}

/// What is shown when nobody says what. A machine that reads wants to hear of finished reports as well.
const fn quiet(format: Format) -> &'static str {
    match format {
        Format::Text => "warn",
        Format::Json => "warn,drctl::report=info",
    }
}

fn filter(directives: &str) -> Result<EnvFilter> {
    let bare = directives.parse::<tracing::Level>().is_ok();
    let spelled = if bare { format!("warn,drctl={directives}") } else { directives.to_owned() };
    EnvFilter::try_new(&spelled).map_err(|error| {
        Error::usage(format!("`{directives}` is not a log level"))
            .because(error)
            .hint("use error, warn, info, debug, trace, or directives such as drctl=debug,hyper=info")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_level_is_for_drctl_alone() {
        let text = filter("debug").unwrap().to_string();
        assert!(text.contains("drctl=debug") && text.contains("warn"), "{text}");
        assert_eq!(filter("hyper=info").unwrap().to_string(), "hyper=info");
    }

    #[test]
    fn nonsense_is_a_usage_error() {
        assert_eq!(filter("drctl=loud").unwrap_err().kind(), crate::model::Kind::Usage);
    }
}
