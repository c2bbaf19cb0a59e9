//! The one public error: what failed, why, what to do next.
//!
//! Rooms keep small enums of meanings; at their edge they convert to [`Error`], and jobs add the step they were in.
//! The chain is printed once, by the door that owns the terminal.

use std::fmt;

/// Result with the public [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What an error means to a script; each kind has one exit code, and the JSON output carries its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The job ran and did not succeed.
    Failed,
    /// The command line or a configuration file is wrong; nothing was touched.
    Usage,
    /// A named thing does not exist.
    NotFound,
    /// Something stands in the way of the plan (a non-empty directory, a gap, a target that cannot be reached).
    Refused,
    /// Somebody else does the same at this moment.
    Busy,
    /// Stored bytes are not what was written.
    Damaged,
    /// Stored bytes are what a newer drctl wrote: this one does not understand them, and leaves them alone.
    Newer,
    /// No key holder could open what is sealed.
    NoKey,
    /// A store, a key service or a server cannot be reached.
    Unavailable,
    /// The reply to a write was lost and could not be settled.
    Unknown,
    /// Asked to stop.
    Cancelled,
}

impl Kind {
    /// The exit code of DESIGN §2: 1 failed, 2 usage, 5 refused by the plan, 75 outcome unknown.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Usage => 2,
            Self::Refused | Self::Busy => 5,
            Self::Unknown => 75,
            Self::Failed
            | Self::NotFound
            | Self::Damaged
            | Self::Newer
            | Self::NoKey
            | Self::Unavailable
            | Self::Cancelled => 1,
        }
    }
}

/// An error as people read it: one line that names the object, the causes from near to far, and the next step.
#[derive(Debug, Clone)]
pub struct Error {
    inner: Box<Inner>,
}

#[derive(Debug, Clone)]
struct Inner {
    kind: Kind,
    message: String,
    causes: Vec<String>,
    hint: Option<String>,
    transient: bool,
}

impl Error {
    /// A new error; `message` names the object and says what happened to it, lower case, without a full stop.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        let inner = Inner { kind, message: message.into(), causes: Vec::new(), hint: None, transient: false };
        Self { inner: Box::new(inner) }
    }

    /// The job ran and did not succeed.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Kind::Failed, message)
    }

    /// Wrong command line or configuration.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, message)
    }

    /// The plan says no.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(Kind::Refused, message)
    }

    /// Stored bytes are wrong.
    pub fn damaged(message: impl Into<String>) -> Self {
        Self::new(Kind::Damaged, message)
    }

    /// A named thing does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, message)
    }

    /// Adds the next cause; call it from near to far.
    #[must_use]
    pub fn because(mut self, cause: impl fmt::Display) -> Self {
        self.inner.causes.push(cause.to_string());
        self
    }

    /// Adds a cause and everything behind it, each link once.
    #[must_use]
    pub fn because_of(mut self, cause: &(dyn std::error::Error + 'static)) -> Self {
        let mut link = Some(cause);
        while let Some(error) = link {
            let text = error.to_string();
            // Many libraries repeat their source in their own Display; a chain that says it twice helps nobody.
            if !self.inner.causes.last().is_some_and(|last| last.contains(&text)) {
                self.inner.causes.push(text);
            }
            link = error.source();
        }
        self
    }

    /// Sets what the reader should do next.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.inner.hint = Some(hint.into());
        self
    }

    /// Marks the error as one that may pass by itself.
    #[must_use]
    pub fn transient(mut self, transient: bool) -> Self {
        self.inner.transient = transient;
        self
    }

    /// Puts the step in front: the old message becomes the nearest cause.
    #[must_use]
    pub fn during(mut self, step: impl Into<String>) -> Self {
        let message = std::mem::replace(&mut self.inner.message, step.into());
        self.inner.causes.insert(0, message);
        self
    }

    /// The meaning.
    pub fn kind(&self) -> Kind {
        self.inner.kind
    }

    /// The first line, without causes.
    pub fn message(&self) -> &str {
        &self.inner.message
    }

    /// Causes from near to far.
    pub fn causes(&self) -> &[String] {
        &self.inner.causes
    }

    /// The next step, if one is known.
    pub fn hint_text(&self) -> Option<&str> {
        self.inner.hint.as_deref()
    }

    /// Whether a retry may help.
    pub fn is_transient(&self) -> bool {
        self.inner.transient
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.inner.message)?;
        for cause in &self.inner.causes {
            write!(f, ": {cause}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

/// Adds the step that a room or a job was in.
pub trait ResultExt<T> {
    /// On error, puts `step` (present tense: "read control file") in front of the message.
    ///
    /// # Errors
    /// The same error with the step in front.
    fn during<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T>;
}

impl<T, E: Into<Error>> ResultExt<T> for std::result::Result<T, E> {
    fn during<S: Into<String>>(self, step: impl FnOnce() -> S) -> Result<T> {
        self.map_err(|error| error.into().during(step()))
    }
}
