// SPDX-License-Identifier: GPL-2.0

//! Measures a client's machine alone: the server is on the other side of a network card.
//!
//! How long the guest waits for what is outside of it depends on the load of the host. So what waits is
//! not counted: whenever nobody else wants the processor, [`Idle`] has it, and its time is subtracted.
//! The kernel's own account of idle time would not do: it leaves out no interrupt.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::matrix::{self, Cell, Setting, Work};
use crate::programs::{self, Connected, DEVICE, Module, sh};
use crate::raw;
use crate::run::{self, Told};
use crate::sample::{Client, Mode, Sample};

/// As `tools/bench-remote` has it. The addresses are of a range for documentation (RFC 5737).
pub const SERVER: &str = "192.0.2.1";
const GUEST: &str = "192.0.2.2/24";

/// A program for fio to start when its job begins and when it ends. It writes a line to [`MARKS`].
const MARK: &str = "/tmp/bench-mark";
/// A named pipe.
const MARKS: &str = "/tmp/bench.marks";

/// Writes a sample a line to standard output. `cells` are parts of names, with commas in between;
/// `variant` is one of those of `tools/bench-remote`.
pub fn run(rounds: &str, variant: &str, cells: &str, quick: bool) -> Outcome<()> {
    let rounds: u32 = rounds.parse()?;
    let setting = Setting::remote(match variant {
        "card" => "remote",
        "plain" => "remote plain",
        "lossy" => "remote lossy",
        _ => return Err(format!("there is no variant {variant}").into()),
    });
    let mut measured = matrix::cells(setting);
    measured.retain(|cell| matrix::is_wanted(setting, cell, cells.split(',')));
    connect_network(variant == "lossy")?;
    let bench = Bench {
        setting,
        cells: measured,
        part: if quick { 6 } else { 1 },
        idle: Idle::start()?,
    };
    for round in 0..rounds {
        // What comes first may be at an advantage, so it is not always the same.
        let mut drivers = [Client::Nbd, Client::Rnbd];
        drivers.rotate_left(round as usize % 2);
        for client in drivers {
            bench.measure_driver(client, round)?;
        }
        bench.measure_floor(round)?;
    }
    Ok(())
}

fn connect_network(lossy: bool) -> Outcome<()> {
    sh(&format!(
        "modprobe virtio_net && ip address add {GUEST} dev eth0 && ip link set eth0 up"
    ))?;
    if lossy {
        sh("modprobe sch_netem && tc qdisc add dev eth0 root netem loss 1% limit 10000")?;
    }
    Ok(())
}

/// What does not change while it is measured.
struct Bench {
    setting: Setting,
    cells: Vec<Cell>,
    /// The number of I/Os is divided by it.
    part: u64,
    idle: Idle,
}

impl Bench {
    fn measure_driver(&self, client: Client, round: u32) -> Outcome<()> {
        let _module = Module::load(client)?;
        let _connected = Connected::connect(self.setting)?;
        programs::fill(DEVICE)?;
        for cell in &self.cells {
            // Where a program begins and ends, it waits for its own threads as well.
            let length = format!(
                "--io_size=1T --number_ios={} --exec_prerun={MARK} --exec_postrun={MARK}",
                cell.ios / self.part
            );
            let (mut told, ios) = run::fio(cell, &format!("--filename={DEVICE}"), &length)?;
            told.leave_out(self.idle.between_marks()?, ios);
            self.sample(client, cell, round, told).print()?;
        }
        Ok(())
    }

    fn measure_floor(&self, round: u32) -> Outcome<()> {
        for cell in &self.cells {
            let Work::Fio { block, depth, .. } = cell.work else {
                continue;
            };
            let write = cell.name.contains("write");
            let ways: &[Client] = match write {
                true => &[Client::Floor, Client::Sendfile],
                false => &[Client::Floor],
            };
            for way in ways {
                let stream = raw::Stream {
                    write,
                    block: block as usize,
                    depth,
                    from_file: *way == Client::Sendfile,
                };
                let ios = cell.ios / self.part;
                let mut near = raw::connect_to(SERVER)?;
                let before = self.idle.run_time_ns();
                let time = raw::exchange(&mut near, &stream, ios)?;
                let idle_ns = self.idle.run_time_ns() - before;
                let mut told = Told::of(time, ios, ios * block);
                told.leave_out(idle_ns, ios);
                self.sample(*way, cell, round, told).print()?;
            }
        }
        Ok(())
    }

    fn sample(&self, client: Client, cell: &Cell, round: u32, told: Told) -> Sample {
        run::sample(Mode::Remote, client, self.setting, cell, round, told)
    }
}

/// A thread that has the processor when nobody else wants it, until dropped. It counts, so that its share
/// is known to the instruction.
struct Idle {
    count: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    ns_per_count: f64,
    /// The count at each mark.
    marks: Receiver<u64>,
}

impl Idle {
    fn start() -> Outcome<Self> {
        let count = Arc::new(AtomicU64::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (name, named) = mpsc::channel();
        let thread = {
            let (count, stop) = (count.clone(), stop.clone());
            thread::spawn(move || {
                let _ = name.send(fs::read_link("/proc/thread-self"));
                // Nobody else writes it.
                for counted in 1.. {
                    count.store(counted, Ordering::Relaxed);
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            })
        };
        let name = named.recv()??;
        let thread_id = name.file_name().and_then(|id| id.to_str());
        sh(&format!(
            "chrt --idle --pid 0 {}",
            thread_id.ok_or("a thread has no name")?
        ))?;
        let ns_per_count = calibrate(&count);
        Ok(Self {
            marks: take_marks(count.clone())?,
            count,
            stop,
            thread: Some(thread),
            ns_per_count,
        })
    }

    fn run_time_ns(&self) -> f64 {
        self.count.load(Ordering::Relaxed) as f64 * self.ns_per_count
    }

    /// What it has run between the two marks of a job, in nanoseconds.
    fn between_marks(&self) -> Outcome<f64> {
        let marks: Vec<u64> = self.marks.try_iter().collect();
        match *marks.as_slice() {
            [begin, end] => Ok((end - begin) as f64 * self.ns_per_count),
            _ => Err(format!("there are {} marks of a job", marks.len()).into()),
        }
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Nanoseconds for one, while nothing else is done: the least of some tries, since there are interrupts.
fn calibrate(count: &AtomicU64) -> f64 {
    let attempt = |_| {
        let (begin, start) = (count.load(Ordering::Relaxed), Instant::now());
        thread::sleep(Duration::from_millis(20));
        let counted = count.load(Ordering::Relaxed) - begin;
        start.elapsed().as_nanos() as f64 / counted as f64
    };
    (0..10).map(attempt).fold(f64::INFINITY, f64::min)
}

/// Starts to answer [`MARK`].
fn take_marks(count: Arc<AtomicU64>) -> Outcome<Receiver<u64>> {
    sh(&format!(
        "mkfifo {MARKS} && printf '#!/bin/sh\\necho > {MARKS}\\n' > {MARK} && chmod +x {MARK}"
    ))?;
    // For writing as well: there is no end of file then when a program closes it.
    let mut pipe = OpenOptions::new().read(true).write(true).open(MARKS)?;
    let (mark, marks) = mpsc::channel();
    thread::spawn(move || {
        while pipe.read_exact(&mut [0]).is_ok() {
            if mark.send(count.load(Ordering::Relaxed)).is_err() {
                break;
            }
        }
    });
    Ok(marks)
}
