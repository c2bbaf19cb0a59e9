//! The choices of a run that draws lots, so that another run can repeat them.

use rand::SeedableRng as _;
use rand::rngs::StdRng;

/// A number from the environment.
pub fn number<N: std::str::FromStr<Err: std::fmt::Debug>>(name: &str) -> Option<N> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// The seed of a run. It is said at the beginning, and again at the end of a run that fails.
#[derive(Debug)]
pub struct Seed {
    number: u64,
    command: String,
}

impl Seed {
    /// That of the run that is to be repeated, else a new one; `command` runs the story.
    #[allow(clippy::print_stdout, reason = "the runner shows it when the story fails")]
    pub fn of_run(command: &str) -> Self {
        let seed = Self { number: number("DRCTL_SOAK_SEED").unwrap_or_else(rand::random), command: command.to_owned() };
        println!("{}", seed.line());
        seed
    }

    /// What draws.
    pub fn chance(&self) -> StdRng {
        StdRng::seed_from_u64(self.number)
    }

    fn line(&self) -> String {
        format!("DRCTL_SOAK_SEED={} {}", self.number, self.command)
    }
}

impl Drop for Seed {
    #[allow(clippy::print_stdout, reason = "the runner shows it when the story fails")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("the same choices again: {}", self.line());
        }
    }
}
