// SPDX-License-Identifier: GPL-2.0

//! Many devices, each with little to do: what an I/O and a device take then.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::Outcome;
use crate::matrix::Setting;
use crate::programs::{Module, PORT, Server, is_kernel_thread, number, sh};
use crate::sample::Client;

const DEVICES: usize = 64;
/// I/Os that each device does, one every so often: so many, and so many more. What the latter take
/// counts, since fio itself takes some time to come and go.
const FEW_IOS: usize = 10;
const MORE_IOS: usize = 80;
const IOS_PER_SECOND: usize = 20;

/// One run with one driver.
#[derive(Debug, Serialize, Deserialize)]
pub struct Sample {
    client: Client,
    devices: usize,
    /// Thousands of instructions for an I/O, of all processes and the kernel.
    instructions_per_io: f64,
    /// Context switches for an I/O, of all tasks.
    switches_per_io: f64,
    /// Of the driver, when all devices are connected.
    kernel_threads: usize,
    kernel_workers: usize,
    kib_per_device: f64,
}

/// In the guest, with a clock that counts instructions. Writes a sample a line to standard output.
pub fn run(rounds: &str) -> Outcome<()> {
    for _ in 0..rounds.parse()? {
        for client in [Client::Nbd, Client::Rnbd] {
            println!("{}", serde_json::to_string(&measure(client)?)?);
        }
    }
    Ok(())
}

fn measure(client: Client) -> Outcome<Sample> {
    let setting = Setting {
        instant: true,
        unix: false,
        connections: 1,
        remote: None,
    };
    let server = Server::start(setting)?;
    let before = State::now(&server)?;
    let module = Module::load_with(client, DEVICES)?;
    for index in 0..DEVICES {
        sh(&format!("nbd-client 127.0.0.1 {PORT} /dev/nbd{index}"))?;
    }
    let connected = State::now(&server)?;
    let few = load(FEW_IOS)?;
    let many = load(FEW_IOS + MORE_IOS)?;
    let ios = (DEVICES * MORE_IOS) as f64;
    for index in 0..DEVICES {
        sh(&format!("nbd-client -d /dev/nbd{index}"))?;
    }
    drop((module, server));
    Ok(Sample {
        client,
        devices: DEVICES,
        instructions_per_io: (many.run_ns - few.run_ns) / ios / 2e3,
        switches_per_io: (many.switches - few.switches) / ios,
        kernel_threads: connected.threads - before.threads,
        kernel_workers: connected.workers.saturating_sub(before.workers),
        kib_per_device: (before.others_kib - connected.others_kib) / DEVICES as f64,
    })
}

/// So many reads on every device, at the same time.
fn load(ios: usize) -> Outcome<Spent> {
    let began = Spent::now()?;
    let mut job = String::from("[global]\n");
    job += "rw=randread\nbs=4k\ndirect=1\nioengine=psync\nthread\n";
    job += &format!("rate_iops={IOS_PER_SECOND}\nnumber_ios={ios}\nsize=32M\n");
    for index in 0..DEVICES {
        job += &format!("[d{index}]\nfilename=/dev/nbd{index}\n");
    }
    fs::write("/tmp/scale.fio", job)?;
    sh("fio --output-format=json /tmp/scale.fio")?;
    let now = Spent::now()?;
    Ok(Spent {
        run_ns: now.run_ns - began.run_ns,
        switches: now.switches - began.switches,
    })
}

/// What there is, when nothing happens.
struct State {
    threads: usize,
    workers: usize,
    /// Free memory, and what the server has.
    others_kib: f64,
}

impl State {
    fn now(server: &Server) -> Outcome<Self> {
        sh("sync && echo 3 > /proc/sys/vm/drop_caches && sleep 2")?;
        let (mut threads, mut workers) = (0, 0);
        for entry in fs::read_dir("/proc")? {
            let Ok(stat) = fs::read_to_string(entry?.path().join("stat")) else {
                continue;
            };
            if is_kernel_thread(&stat) {
                // A rescuer is a work queue's own; the other workers are everybody's.
                let worker = stat.contains("(kworker/") && !stat.contains("(kworker/R-");
                threads += usize::from(!worker);
                workers += usize::from(worker);
            }
        }
        let free = number("/proc/meminfo", |line| line.strip_prefix("MemAvailable:"))?;
        Ok(Self {
            threads,
            workers,
            others_kib: free + server.memory_kib()?,
        })
    }
}

/// What is spent.
struct Spent {
    run_ns: f64,
    switches: f64,
}

impl Spent {
    /// Since the machine came up.
    fn now() -> Outcome<Self> {
        // The seventh number of a processor: for how long tasks have run on it.
        let schedstat = fs::read_to_string("/proc/schedstat")?;
        let run_ns = schedstat
            .lines()
            .filter(|line| line.starts_with("cpu"))
            .filter_map(|line| line.split_whitespace().nth(7)?.parse::<f64>().ok())
            .sum();
        let switches = number("/proc/stat", |line| line.strip_prefix("ctxt "))?;
        Ok(Self { run_ns, switches })
    }
}

/// On the host: prints what `path` has.
pub fn report(path: &Path) -> Outcome<()> {
    println!(
        "{DEVICES} devices with little to do each\n\n{:<7} {:>14} {:>13} {:>15} {:>15} {:>11}",
        "", "K instr. an I/O", "switches", "kernel threads", "kernel workers", "KiB a device"
    );
    for line in fs::read_to_string(path)?.lines() {
        if let Ok(sample) = serde_json::from_str::<Sample>(line) {
            println!(
                "{:<7} {:>14.1} {:>13.2} {:>15} {:>15} {:>11.0}",
                format!("{:?}", sample.client),
                sample.instructions_per_io,
                sample.switches_per_io,
                sample.kernel_threads,
                sample.kernel_workers,
                sample.kib_per_device
            );
        }
    }
    println!();
    Ok(())
}
