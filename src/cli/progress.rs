//! Progress on the screen: a line per phase that is redrawn on a terminal, a plain line every ten seconds otherwise,
//! nothing with `--json`.

use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::cli::figures;
use crate::cli::render::Output;
use crate::observe::progress::{PhaseSnapshot, Progress, Snapshot};
use crate::observe::task;

const REDRAW: Duration = Duration::from_millis(100);
const PLAIN_LINE: Duration = Duration::from_secs(10);
/// Rates are measured over this long: short enough to follow a change, long enough to be readable.
const RATE_WINDOW: Duration = Duration::from_secs(10);
const BAR_CELLS: u64 = 24;

/// Progress that is being shown. End it before the result is printed.
#[derive(Debug)]
pub struct Shown {
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

/// Shows `progress` on stderr until [`Shown::end`].
pub fn show(progress: Progress, output: &Output) -> Shown {
    let stop = CancellationToken::new();
    let terminal = std::io::stderr().is_terminal();
    let task = (!output.json).then(|| {
        let (output, stop) = (output.clone(), stop.clone());
        task::spawn("progress", async move {
            let mut screen = Screen { output, terminal, lines: Vec::new() };
            let mut ticks = tokio::time::interval(if terminal { REDRAW } else { PLAIN_LINE });
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
            // The first tick comes at once, when there is nothing to tell yet.
            ticks.tick().await;
            while stop.run_until_cancelled(ticks.tick()).await.is_some() {
                screen.update(&progress);
            }
            screen.clear(&progress);
        })
    });
    Shown { stop, task }
}

impl Shown {
    /// Tells the last notes and clears the lines.
    pub async fn end(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            // A panic in drawing was logged by the task itself, and must not fail the job that it drew.
            let _ = task.await;
        }
    }
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

struct Screen {
    output: Output,
    terminal: bool,
    lines: Vec<Line>,
}

struct Line {
    bar: ProgressBar,
    meter: Meter,
}

impl Screen {
    fn update(&mut self, progress: &Progress) {
        self.tell_notes(progress);
        let Snapshot { at, phases } = progress.snapshot();
        for (index, phase) in phases.iter().enumerate() {
            if self.lines.len() == index {
                let bar = ProgressBar::hidden().with_style(style());
                let shown = self.terminal && phase.ended.is_none();
                let bar = if shown { self.output.bars.add(bar) } else { bar };
                self.lines.push(Line { bar, meter: Meter::default() });
            }
            let Some(line) = self.lines.get_mut(index) else { continue };
            let rate = line.meter.rate(at, phase.done);
            match (self.terminal, phase.ended) {
                (true, None) => line.bar.set_message(text(phase, rate, true)),
                (true, Some(_)) => line.bar.finish_and_clear(),
                (false, None) => say(&self.output, &text(phase, rate, false)),
                (false, Some(_)) => (),
            }
        }
    }

    fn clear(&self, progress: &Progress) {
        self.lines.iter().for_each(|line| line.bar.finish_and_clear());
        self.tell_notes(progress);
    }

    fn tell_notes(&self, progress: &Progress) {
        progress.take_notes().iter().for_each(|note| say(&self.output, note));
    }
}

fn say(output: &Output, line: &str) {
    // Progress that nobody can read is no reason to fail a backup.
    let _ = output.bars.suspend(|| writeln!(std::io::stderr().lock(), "{line}"));
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{wide_msg}").unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Bytes per second over the last [`RATE_WINDOW`].
#[derive(Debug, Default)]
struct Meter {
    samples: VecDeque<(Duration, u64)>,
}

impl Meter {
    fn rate(&mut self, at: Duration, done: u64) -> u64 {
        self.samples.push_back((at, done));
        while self.samples.len() > 2 && self.samples.front().is_some_and(|(first, _)| at - *first > RATE_WINDOW) {
            self.samples.pop_front();
        }
        let (since, before) = self.samples.front().copied().unwrap_or((at, done));
        let milliseconds = at.saturating_sub(since).as_millis().max(1);
        u64::try_from(u128::from(done - before.min(done)) * 1000 / milliseconds).unwrap_or(u64::MAX)
    }
}

/// `fetch  ████░░░░  79 %  1.30/1.65 GB  412 MB/s  1 s left  waits for eu-west-1`
fn text(phase: &PhaseSnapshot, rate: u64, with_bar: bool) -> String {
    let mut parts = vec![phase.name.to_owned()];
    // An estimate that was passed is no whole any more.
    match phase.total.filter(|total| *total > 0 && phase.done <= *total) {
        Some(total) => {
            if with_bar {
                parts.push(bar(phase.done, total));
            }
            parts.push(format!("{} %", share(phase.done, total, 100)));
            parts.push(figures::bytes_of(phase.done, total));
        }
        None if phase.done > 0 => parts.push(figures::bytes(phase.done)),
        None => (),
    }
    if rate > 0 {
        parts.push(format!("{}/s", figures::bytes(rate)));
        if let Some(left) = phase.total.and_then(|total| total.checked_sub(phase.done)) {
            parts.push(format!("{} left", figures::duration(Duration::from_secs(left.div_ceil(rate)))));
        }
    }
    parts.extend(phase.note.clone());
    parts.join("  ")
}

fn bar(done: u64, total: u64) -> String {
    let full = share(done, total, BAR_CELLS);
    (0..BAR_CELLS).map(|cell| if cell < full { '█' } else { '░' }).collect()
}

/// `done / total` in `parts`, cut off: nothing shows as complete before it is.
fn share(done: u64, total: u64, parts: u64) -> u64 {
    let share = u128::from(done) * u128::from(parts) / u128::from(total.max(1));
    u64::try_from(share).unwrap_or(parts).min(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn phase(done: u64, total: Option<u64>) -> PhaseSnapshot {
        PhaseSnapshot { name: "fetch", done, total, started: Duration::ZERO, ended: None, note: None }
    }

    #[test]
    fn a_line_tells_share_size_rate_and_time_left() {
        let known = phase(1_300_000_000, Some(1_650_000_000));
        assert_eq!(text(&known, 412_000_000, false), "fetch  78 %  1.30/1.65 GB  412 MB/s  1 s left");
        assert!(text(&known, 0, true).contains("██████████████████░░░░░░"));
        assert_eq!(text(&phase(0, None), 0, true), "fetch");
        assert_eq!(text(&phase(7, Some(5)), 0, true), "fetch  7 B");
        let waiting = PhaseSnapshot { note: Some("waits for eu-west-1".into()), ..phase(0, Some(10)) };
        assert_eq!(text(&waiting, 0, false), "fetch  0 %  0/10 B  waits for eu-west-1");
    }

    #[test]
    fn nothing_shows_as_complete_before_it_is() {
        assert_eq!(share(u64::MAX - 1, u64::MAX, 100), 99);
        assert_eq!(share(10, 10, 100), 100);
    }

    #[tokio::test]
    async fn what_is_shown_ends_when_it_is_told_to() {
        let progress = Progress::new(std::sync::Arc::new(crate::observe::SystemClock::new()));
        for json in [false, true] {
            let shown = show(progress.clone(), &Output::new(json));
            let phase = progress.begin("fetch", Some(100));
            phase.advance(42);
            progress.note("a note");
            tokio::time::sleep(2 * REDRAW).await;
            phase.finish();
            tokio::time::timeout(Duration::from_secs(5), shown.end()).await.unwrap();
        }
        assert_eq!(progress.take_notes(), ["a note"]);
    }

    #[test]
    fn the_rate_follows_the_last_seconds() {
        let mut meter = Meter::default();
        let rates: Vec<_> = (0..=30).map(|s| meter.rate(Duration::from_secs(s), s.min(10) * 1000)).collect();
        assert_eq!((rates[0], rates[10], rates[30]), (0, 1000, 0));
    }
}
