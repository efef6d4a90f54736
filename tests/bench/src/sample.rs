// SPDX-License-Identifier: GPL-2.0

//! What a measurement yields, and how it is written down: one JSON object a line.

use serde::{Deserialize, Serialize};

use crate::Outcome;

/// How time passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// One processor, and the clock counts its instructions, two nanoseconds each.
    Cost,
    /// Several processors, and the clock is a clock.
    Wall,
    /// As `Cost`, with the server on another machine, and without the time that this one waits.
    Remote,
}

impl Mode {
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "cost" => Some(Self::Cost),
            "wall" => Some(Self::Wall),
            _ => None,
        }
    }
}

/// Who does the I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Client {
    /// The kernel's own driver.
    Nbd,
    /// The driver that is compared with it.
    Rnbd,
    /// fio's client in user space, without any driver.
    Fio,
    /// What no driver can do without: the same bytes over a socket and nothing else, or, for a file
    /// system, the same work on a disk of the guest's memory.
    Floor,
    /// The same with `sendfile`, so that nothing is copied.
    Sendfile,
}

/// One run of one cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Sample {
    pub mode: Mode,
    pub client: Client,
    /// Where it was measured: server, transport, connections.
    pub setting: String,
    pub cell: String,
    pub round: u32,
    /// Nanoseconds for an I/O; where instructions are counted, twice their number.
    pub ns_per_io: f64,
    pub mib_per_s: f64,
    /// Completion latency, where the program tells.
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    /// Time of the processors for an I/O: all of it, and that of kernel threads.
    pub cpu_us_per_io: Option<f64>,
    pub kernel_threads_us_per_io: Option<f64>,
}

impl Sample {
    pub fn print(&self) -> Outcome<()> {
        println!("{}", serde_json::to_string(self)?);
        Ok(())
    }
}
