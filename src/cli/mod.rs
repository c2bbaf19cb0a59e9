//! Floor 4, the command line: arguments in, one verb run, its result or its error out, an exit code at the end.
//!
//! This is the only room that prints, and it prints in [`render`] alone: results on stdout, everything else on stderr.
//! Each file in [`verbs`] holds the arguments of one verb and the function that runs it.

use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{CommandFactory, FromArgMatches, Parser};

use crate::app;
use crate::cli::exit::{Exit, Reader};
use crate::cli::globals::Globals;
use crate::cli::render::Output;
use crate::cli::verbs::Verb;
use crate::config::Settings;
use crate::model::{Clock, Error, Result};
use crate::observe::{SystemClock, log, task};

pub mod exit;
pub mod figures;
pub mod globals;
pub mod progress;
pub mod render;
pub mod time;
pub mod verbs;

/// Keep PostgreSQL recoverable in several regions, and prove it.
#[derive(Debug, Parser)]
#[command(name = "drctl", version, max_term_width = 100, subcommand_required = true, arg_required_else_help = true)]
struct Arguments {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    verb: Verb,
}

/// How long threads that still work are waited for after the result is known.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(10);

/// What every verb has at hand.
#[derive(Debug)]
pub struct Session {
    /// Where results go.
    pub output: Output,
    /// The clock of this process.
    pub clock: Arc<dyn Clock>,
    program: String,
    globals: Globals,
}

impl Session {
    /// The settings: from the regions named with `--repo`, else from the configuration file.
    ///
    /// # Errors
    /// There is no configuration, or it is wrong.
    pub fn settings(&self) -> Result<Settings> {
        self.globals.settings()
    }

    /// The words before the verb with which another command finds this program and the same repository.
    pub fn invocation(&self) -> Vec<String> {
        [self.program.clone()].into_iter().chain(self.globals.words()).collect()
    }
}

/// Runs drctl with the arguments of a process, the first of which is its name.
pub fn main(arguments: Vec<OsString>) -> ExitCode {
    if let [name, verb, words @ ..] = arguments.as_slice()
        && verb == app::WITH_PARENT
    {
        let error = app::become_program(words);
        Output::new(false).tell(&error, reader_of(std::slice::from_ref(name)));
        return ExitCode::FAILURE;
    }
    let reader = reader_of(&arguments);
    let output = Output::new(arguments.iter().any(|argument| argument == "--json"));
    // A panic ends with 101, which PostgreSQL would take for the end of the archive.
    let caught = catch_unwind(AssertUnwindSafe(|| parse_and_run(&arguments, &output)));
    let result = caught.unwrap_or_else(|panic| {
        let cause = task::panic_text(panic.as_ref()).to_owned();
        Err(Error::failed("drctl stopped at a fault of its own").because(cause).hint("please report it"))
    });
    if let Err(error) = &result {
        output.tell(error, reader);
    }
    ExitCode::from(reader.code(&result))
}

/// Any mention of the verb counts, so that a command line that cannot be parsed is not answered with 2: recovery would
/// take it for the end of the archive.
fn reader_of(arguments: &[OsString]) -> Reader {
    let says = |word: &str| arguments.iter().any(|argument| argument == word);
    match () {
        () if says(verbs::recovery_fetch::NAME) || says("wal") && says("fetch") => Reader::Recovery,
        () if says("wal") && says("push") => Reader::Archive,
        () => Reader::Script,
    }
}

fn parse_and_run(line: &[OsString], output: &Output) -> Result<Exit> {
    let Arguments { globals, verb } = match parse(line) {
        Ok(arguments) => arguments?,
        Err(told) => return told_by_clap(&told, output),
    };
    let level = globals.log_level.as_deref().or_else(|| verb.log_level());
    log::init_with(level, globals.log_format.into(), output.clone())?;
    let clock = Arc::new(SystemClock::new());
    let session = Session { output: output.clone(), clock, program: program(line.first()), globals };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::failed("no thread could be started").because(error))?;
    let ended = runtime.block_on(verbs::run(verb, &session));
    // A job that hangs in a system call cannot be ended; the process can.
    runtime.shutdown_timeout(SHUTDOWN_LIMIT);
    ended
}

/// How this program was called: a shell that found it by a path finds it by that path again.
fn program(called: Option<&OsString>) -> String {
    let path = called.map(|name| name.to_string_lossy().into_owned()).filter(|name| name.contains('/'));
    path.unwrap_or_else(|| "drctl".to_owned())
}

/// Whether a line can be parsed, and what is wrong with it if not. Documents are tested with it, so that the commands in
/// them can be typed.
///
/// # Errors
/// What is wrong, in words.
pub fn check_line(line: &[OsString]) -> Result<(), String> {
    match parse(line) {
        Ok(arguments) => arguments.map(|_| ()).map_err(|error| error.to_string()),
        Err(told) if told.use_stderr() => Err(told.to_string()),
        Err(_) => Ok(()),
    }
}

/// The outer error is what clap tells in its own words: help, the version, wrong usage.
fn parse(arguments: &[OsString]) -> std::result::Result<Result<Arguments>, clap::Error> {
    let mut command = Arguments::command();
    let matches = command.try_get_matches_from_mut(globals::hoist(arguments))?;
    let arguments = Arguments::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
    let Arguments { mut globals, verb } = arguments;
    Ok(globals.pair_repositories(&matches).map(|()| Arguments { globals, verb }))
}

fn told_by_clap(told: &clap::Error, output: &Output) -> Result<Exit> {
    if !told.use_stderr() {
        output.print(&told.render().to_string())?;
        return Ok(Exit::Ok);
    }
    if !output.json && told.print().is_ok() {
        return Ok(Exit::Usage);
    }
    let text = told.render().to_string();
    let (message, rest) = text.split_once("\n\n").unwrap_or((&text, ""));
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let tip = rest.lines().find_map(|line| line.trim().strip_prefix("tip: "));
    let hint = tip.unwrap_or("drctl --help lists every verb and option");
    Err(Error::usage(message.strip_prefix("error: ").unwrap_or(&message)).hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(line: &[&str]) -> String {
        let arguments: Vec<OsString> = line.iter().map(OsString::from).collect();
        match parse(&arguments) {
            Ok(Ok(arguments)) => format!("{arguments:?}"),
            Ok(Err(error)) => format!("{error}"),
            Err(error) => format!("{error}"),
        }
    }

    #[test]
    fn the_command_tree_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_slip_gets_the_nearest_verb() {
        assert!(told(&["drctl", "restor"]).contains("restore"));
    }

    #[test]
    fn json_hears_of_wrong_usage_too() {
        let output = Output::new(true);
        let arguments: Vec<OsString> = ["drctl", "lost", "--json"].map(OsString::from).into();
        let error = parse_and_run(&arguments, &output).unwrap_err();
        assert_eq!(Exit::of(&error), Exit::Usage);
        assert!(error.message().contains("lost"), "{error}");
    }

    #[test]
    fn recovery_hears_255_whatever_was_wrong() {
        let fetches = [
            &["drctl", "recovery-fetch"][..],
            &["drctl", "--nonsense", "recovery-fetch", "a", "b"],
            &["drctl", "wal", "fetch"],
            &["drctl", "--nonsense", "wal", "fetch", "a", "b"],
        ];
        for line in fetches {
            let arguments: Vec<OsString> = line.iter().map(OsString::from).collect();
            assert_eq!(main(arguments), ExitCode::from(255), "{line:?}");
        }
    }

    #[test]
    fn the_archiver_hears_1_whatever_was_wrong() {
        for line in [&["drctl", "wal", "push"][..], &["drctl", "wal", "push", "--socket", "/nonexistent", "/x/y", "z"]]
        {
            let arguments: Vec<OsString> = line.iter().map(OsString::from).collect();
            assert_eq!(main(arguments), ExitCode::from(1), "{line:?}");
        }
    }
}
