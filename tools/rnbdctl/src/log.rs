// SPDX-License-Identifier: GPL-2.0

//! Messages of a program that must not wait for whoever reads them.
//!
//! The reader may wait for the very device that the program is about to repair, as a journal on that device does. So
//! a thread writes, and what does not fit into its queue is lost, and counted.

use std::io::{self, Write};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

/// How many messages may wait.
const ROOM: usize = 1000;

/// How long the end of the program waits for its messages to be written.
const PATIENCE: Duration = Duration::from_secs(1);

static LOG: OnceLock<Log> = OnceLock::new();

enum Entry {
    Line(String),
    /// Tells that all before it was written.
    Mark(SyncSender<()>),
}

struct Log {
    entries: SyncSender<Entry>,
    /// How many messages did not fit since the last one that did.
    lost: AtomicUsize,
}

impl Log {
    fn new(room: usize) -> (Self, Receiver<Entry>) {
        let (entries, queue) = sync_channel(room);
        let lost = AtomicUsize::new(0);
        (Self { entries, lost }, queue)
    }

    fn put(&self, text: &str) {
        self.put_lost();
        if self.entries.try_send(Entry::Line(text.into())).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Tells how many were lost, once there is room for that.
    fn put_lost(&self) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost == 0 {
            return;
        }
        let text = format!("{lost} messages were lost: nobody read them");
        if self.entries.try_send(Entry::Line(text)).is_err() {
            self.lost.fetch_add(lost, Ordering::Relaxed);
        }
    }

    fn finish(&self, patience: Duration) {
        self.put_lost();
        let (mark, reached) = sync_channel(1);
        if self.entries.try_send(Entry::Mark(mark)).is_ok() {
            // Whoever does not read in time misses the rest.
            let _ = reached.recv_timeout(patience);
        }
    }
}

fn write_all(queue: &Receiver<Entry>, out: &mut impl Write) {
    while let Ok(entry) = queue.recv() {
        match entry {
            // Nobody may be there to read it, which is no reason to end.
            Entry::Line(text) => drop(writeln!(out, "rnbdctl: {text}")),
            Entry::Mark(mark) => drop(mark.try_send(())),
        }
    }
}

/// Has a thread write all messages from now on.
///
/// # Errors
///
/// There can be no thread.
pub fn start() -> io::Result<()> {
    let (log, queue) = Log::new(ROOM);
    thread::Builder::new().spawn(move || write_all(&queue, &mut io::stderr()))?;
    // If there is one already, the new thread ends.
    let _ = LOG.set(log);
    Ok(())
}

/// Waits until all messages are written, but not for long.
pub fn finish() {
    if let Some(log) = LOG.get() {
        log.finish(PATIENCE);
    }
}

/// Prints a message for people, by the thread if there is one.
pub fn tell(text: &str) {
    match LOG.get() {
        Some(log) => log.put(text),
        None => drop(writeln!(io::stderr(), "rnbdctl: {text}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(queue: &Receiver<Entry>) -> Vec<String> {
        let entries = queue.try_iter().filter_map(|entry| match entry {
            Entry::Line(text) => Some(text),
            Entry::Mark(_) => None,
        });
        entries.collect()
    }

    #[test]
    fn nobody_waits_for_a_reader() {
        let (log, queue) = Log::new(2);
        for text in ["a", "b", "c", "d"] {
            log.put(text);
        }
        log.finish(Duration::from_millis(1));
        assert_eq!(written(&queue), ["a", "b"]);
        log.put("e");
        let lost = "2 messages were lost: nobody read them";
        assert_eq!(written(&queue), [lost, "e"]);
        log.put("f");
        assert_eq!(written(&queue), ["f"], "they are told once");
    }

    /// The disk is full, or the reader is gone: that must not change how the program ends.
    #[test]
    fn what_cannot_be_written_is_no_reason_to_end() {
        let (log, queue) = Log::new(2);
        let full = std::fs::File::options().write(true).open("/dev/full");
        let writer = thread::spawn(move || write_all(&queue, &mut full.unwrap()));
        log.put("a");
        log.finish(Duration::from_secs(60));
        drop(log);
        assert!(writer.join().is_ok());
    }

    #[test]
    fn what_is_put_is_written() {
        let (log, queue) = Log::new(2);
        let writer = thread::spawn(move || {
            let mut out = Vec::new();
            write_all(&queue, &mut out);
            out
        });
        log.put("a");
        log.finish(Duration::from_secs(60));
        drop(log);
        assert_eq!(writer.join().unwrap(), b"rnbdctl: a\n");
    }
}
