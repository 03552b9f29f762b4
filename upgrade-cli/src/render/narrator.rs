//! Tells a run's story as it becomes durable: bars for a person, lines for a log, JSON for a program.

use std::collections::BTreeMap;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use upgrade_core::context::Progress;
use upgrade_core::entry::{Entry, Record};
use upgrade_core::executor::Observer;
use upgrade_core::names::RunId;

use super::event::{clock, describe};
use super::palette::{Palette, harmless};
use crate::console::Console;

/// Watches a run and tells of it.
pub(crate) struct Narrator {
    console: Console,
    bars: Option<Bars>,
    /// Whether lines name the run: several may be told of at once.
    named: bool,
}

/// Writes a record with the run that it belongs to.
#[derive(Serialize)]
pub(crate) struct Line<'a> {
    pub(crate) run: &'a RunId,
    #[serde(flatten)]
    pub(crate) record: &'a Record,
}

impl Narrator {
    pub(crate) fn new(console: Console) -> Self {
        Self { console, bars: console.bars().then(|| Bars::new(console.err())), named: false }
    }

    /// Makes a narrator for one run of several: lines that name it, no bars.
    pub(crate) fn of_several(console: Console) -> Self {
        Self { console, bars: None, named: true }
    }

    /// Returns what ends the drawing, for when the narrator itself is on another thread.
    pub(crate) fn curtain(&self) -> Curtain {
        Curtain(self.bars.as_ref().map(|bars| bars.all.clone()))
    }

    /// Tells of a record.
    pub(crate) fn tell(&mut self, run: &RunId, record: &Record) {
        if self.console.json() {
            // A reader that went away, or a full disk behind stdout, must not fail a run.
            let _ = self.console.object(&Line { run, record });
            return;
        }
        let text =
            if self.console.quiet() { None } else { describe(record, self.console.err(), self.console.verbose()) };
        match (&mut self.bars, text) {
            (Some(bars), text) => bars.tell(&record.entry, text),
            (None, Some(text)) if self.named => self.console.note(format_args!("{} {run} {text}", clock(record.at))),
            (None, Some(text)) => self.console.note(format_args!("{} {text}", clock(record.at))),
            (None, None) => {}
        }
    }
}

impl Observer for Narrator {
    fn entry(&mut self, run: &RunId, record: &Record) {
        self.tell(run, record);
    }

    fn progress(&mut self, progress: &Progress) {
        if let Some(bars) = &mut self.bars {
            bars.progress(progress);
        }
    }
}

/// Ends the drawing, so that what is printed next is not drawn over.
pub(crate) struct Curtain(Option<MultiProgress>);

impl Drop for Curtain {
    fn drop(&mut self) {
        if let Some(all) = &self.0 {
            // A bar left behind would be drawn again at its next tick.
            let _ = all.clear();
            all.set_draw_target(ProgressDrawTarget::hidden());
        }
    }
}

/// Draws one bar for each step that is being worked on, below the lines told so far.
struct Bars {
    all: MultiProgress,
    steps: BTreeMap<String, ProgressBar>,
    palette: Palette,
}

impl Bars {
    fn new(palette: Palette) -> Self {
        Self { all: MultiProgress::new(), steps: BTreeMap::new(), palette }
    }

    fn tell(&mut self, entry: &Entry, text: Option<String>) {
        match entry {
            Entry::StepPrepared { step, .. } => self.start(step.as_str(), "applying"),
            Entry::StepUndoing { step } => self.start(step.as_str(), "undoing"),
            Entry::StepApplied { step, .. } | Entry::StepUndone { step, .. } => self.end(step.as_str()),
            Entry::StepFailed { step, retry_at: None, .. } => self.end(step.as_str()),
            Entry::RunEntered { .. } => {
                std::mem::take(&mut self.steps).values().for_each(ProgressBar::finish_and_clear);
            }
            _ => {}
        }
        // A bar says that a step has begun; the line would say it twice.
        let begun = matches!(entry, Entry::StepPrepared { .. } | Entry::StepUndoing { .. });
        if let Some(text) = text.filter(|text| !begun || text.contains('\n')) {
            let _ = self.all.println(text);
        }
    }

    fn start(&mut self, step: &str, doing: &'static str) {
        let bar = self.all.add(ProgressBar::no_length());
        bar.set_style(spinner(self.palette));
        bar.set_prefix(step.to_owned());
        bar.set_message(doing);
        bar.enable_steady_tick(Duration::from_millis(100));
        if let Some(old) = self.steps.insert(step.to_owned(), bar) {
            old.finish_and_clear();
        }
    }

    fn end(&mut self, step: &str) {
        if let Some(bar) = self.steps.remove(step) {
            bar.finish_and_clear();
            self.all.remove(&bar);
        }
    }

    fn progress(&mut self, progress: &Progress) {
        let Some(bar) = self.steps.get(&progress.step) else { return };
        if let Some(total) = progress.total {
            if bar.length() != Some(total) {
                bar.set_length(total);
                bar.set_style(measured(self.palette));
            }
            bar.set_position(progress.done);
        }
        bar.set_message(harmless(&progress.message));
    }
}

fn spinner(palette: Palette) -> ProgressStyle {
    let template = if palette.is_on() {
        "  {spinner:.cyan} {prefix:.bold} {msg} {elapsed:.dim}"
    } else {
        "  {spinner} {prefix} {msg} {elapsed}"
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}

fn measured(palette: Palette) -> ProgressStyle {
    let template = if palette.is_on() {
        "  {spinner:.cyan} {prefix:.bold} {bar:24.cyan} {percent}% {msg} {elapsed:.dim}"
    } else {
        "  {spinner} {prefix} {bar:24} {percent}% {msg} {elapsed}"
    };
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
