// SPDX-License-Identifier: GPL-2.0

//! Where requests end.

use std::fs;
use std::os::unix::fs::FileExt;
use std::thread;

use crate::device::Plan;
use crate::harness::{Guest, Test, run_on, skip};
use crate::programs::sh;
use crate::server::Transport;
use crate::sys::Buffer;
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![test!(follow_rq_affinity)]
}

/// A trace of the requests that have ended, until it is dropped.
struct Ends;

impl Ends {
    const PATH: &str = "/sys/kernel/tracing/instances/ends";

    fn begin() -> Self {
        sh(&format!(
            "mountpoint -q /sys/kernel/tracing || mount -t tracefs tracefs /sys/kernel/tracing
             mkdir {path}
             echo 1 > {path}/events/block/block_rq_complete/enable",
            path = Self::PATH
        ));
        Self
    }

    /// The processors, as the trace calls them, on which reads of nbd0 have ended.
    fn of_reads(&self) -> Vec<String> {
        let trace = fs::read_to_string(format!("{}/trace", Self::PATH)).unwrap();
        let reads = trace.lines().filter(|line| line.contains(": 43,0 R"));
        reads
            .map(|line| {
                let (_, rest) = line.split_once('[').expect("a processor");
                rest.split(']').next().unwrap_or(rest).to_owned()
            })
            .collect()
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        sh(&format!(
            "echo 0 > {path}/events/block/block_rq_complete/enable; rmdir {path}",
            path = Self::PATH
        ));
    }
}

/// The server's task and, over TCP, what it sends are on another processor than the reader.
fn follow_rq_affinity(_: &Guest) {
    if fs::read_to_string("/proc/version").is_ok_and(|version| version.contains("PREEMPT_RT")) {
        skip("where interrupts are threads, as on PREEMPT_RT, the block layer ignores rq_affinity");
    }
    for transport in [Transport::Unix, Transport::Tcp4] {
        let rig = Plan::new(1 << 20).transport(transport).attach();
        rig.server.script(|conn, request| {
            run_on(0);
            conn.serve(request)
        });
        let direct = rig.direct();
        fs::write("/sys/block/nbd0/queue/rq_affinity", "2").unwrap();
        let ends = Ends::begin();
        thread::scope(|scope| {
            scope.spawn(|| {
                run_on(1);
                for size in [4096, 64 << 10, 512, 256 << 10].repeat(5) {
                    direct.read_exact_at(&mut Buffer::new(size), 0).unwrap();
                }
            });
        });
        assert_eq!(ends.of_reads(), ["001"; 20], "{transport:?}");
    }
}
