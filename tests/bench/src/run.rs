// SPDX-License-Identifier: GPL-2.0

//! Measures, in the guest.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::Outcome;
use crate::matrix::{self, Cell, REGION_MIB, Setting, Work};
use crate::programs::{self, Connected, DEVICE, Module, PORT, RamDisk, SOCKET, Server, sh};
use crate::raw;
use crate::sample::{Client, Mode, Sample};

/// How much is measured.
pub struct Extent {
    mode: Mode,
    rounds: u32,
    quick: bool,
    /// Parts of the names of cells that are measured; none: all are.
    only: Vec<String>,
}

/// Writes a sample a line to standard output. `cells` are parts of names, with commas in between.
pub fn run(mode: &str, rounds: &str, quick: bool, cells: &str) -> Outcome<()> {
    let names = cells.split(',').filter(|name| !name.is_empty());
    let extent = Extent {
        mode: Mode::parse(mode).ok_or("the mode is cost or wall")?,
        rounds: rounds.parse()?,
        quick,
        only: names.map(str::to_owned).collect(),
    };
    make_tree()?;
    warm_up()?;
    for round in 0..extent.rounds {
        for setting in extent.settings() {
            // What comes first may be at an advantage, so it is not always the same.
            let mut drivers = [Client::Nbd, Client::Rnbd];
            drivers.rotate_left(round as usize % 2);
            for client in drivers {
                extent.measure_driver(client, setting, round)?;
            }
            if setting.connections == 1 && !quick {
                extent.measure_references(setting, round)?;
            }
        }
    }
    Ok(())
}

impl Extent {
    fn settings(&self) -> Vec<Setting> {
        let mut settings = matrix::settings(self.mode);
        // All that are asked for by name are measured.
        let left_out = |setting: &Setting| self.quick && self.only.is_empty() && setting.instant;
        settings.retain(|setting| !left_out(setting) && !self.cells(*setting).is_empty());
        settings
    }

    fn cells(&self, setting: Setting) -> Vec<Cell> {
        let mut cells = matrix::cells(setting);
        cells.retain(|cell| matrix::is_wanted(setting, cell, self.only.iter().map(String::as_str)));
        cells
    }

    /// I/Os of a run, where they are counted.
    fn ios(&self, cell: &Cell) -> Option<u64> {
        let part = if self.quick { 3 } else { 1 };
        (self.mode == Mode::Cost).then_some(cell.ios / part)
    }

    /// How long a run is, where it is not counted.
    fn limit(&self) -> Duration {
        Duration::from_millis(if self.quick { 500 } else { 1000 })
    }

    fn measure_driver(&self, client: Client, setting: Setting, round: u32) -> Outcome<()> {
        let _module = Module::load(client)?;
        let server = Server::start(setting)?;
        let _connected = Connected::connect(setting)?;
        programs::fill(DEVICE)?;
        for cell in self.cells(setting) {
            if let Work::FileSystem { .. } = cell.work {
                // The one before has left it with holes.
                programs::fill(DEVICE)?;
            }
            let before = Processors::now(&server)?;
            let (told, ios) = match &cell.work {
                Work::FileSystem { options } => (file_system(DEVICE, options)?, 1),
                Work::Fio { .. } => {
                    fio(&cell, &format!("--filename={DEVICE}"), &self.length(&cell))?
                }
            };
            let mut sample = sample(self.mode, client, setting, &cell, round, told);
            let spent = Processors::now(&server)?.since(&before);
            sample.kernel_threads_us_per_io = Some(spent.kernel_threads_us / ios as f64);
            sample.cpu_us_per_io = sample
                .cpu_us_per_io
                .map(|own| own + (spent.kernel_threads_us + spent.server_us) / ios as f64);
            sample.print()?;
        }
        Ok(())
    }

    fn measure_references(&self, setting: Setting, round: u32) -> Outcome<()> {
        let server = Server::start(setting)?;
        let uri = if setting.unix {
            format!("nbd+unix:///?socket={SOCKET}")
        } else {
            format!("nbd://127.0.0.1:{PORT}/")
        };
        for cell in self.cells(setting) {
            let (block, depth) = match cell.work {
                Work::Fio { block, depth, .. } => (block, depth),
                Work::FileSystem { options } => {
                    let _disk = RamDisk::new()?;
                    let told = file_system(RamDisk::DEVICE, options)?;
                    sample(self.mode, Client::Floor, setting, &cell, round, told).print()?;
                    continue;
                }
            };
            if cell.without_device {
                let before = Processors::now(&server)?;
                let target = format!("--ioengine=nbd --uri={uri}");
                let (told, ios) = fio(&cell, &target, &self.length(&cell))?;
                let mut sample = sample(self.mode, Client::Fio, setting, &cell, round, told);
                let spent = Processors::now(&server)?.since(&before);
                sample.cpu_us_per_io = sample
                    .cpu_us_per_io
                    .map(|own| own + spent.server_us / ios as f64);
                sample.print()?;
            }
            if setting.instant && block > 0 {
                let stream = raw::Stream {
                    write: cell.name.contains("write"),
                    block: block as usize,
                    depth,
                    from_file: false,
                };
                let (ios, time) = raw::run(setting.unix, &stream, self.ios(&cell), self.limit())?;
                let told = Told::of(time, ios, ios * block);
                sample(self.mode, Client::Floor, setting, &cell, round, told).print()?;
            }
        }
        Ok(())
    }

    /// fio's options for how long a run is.
    fn length(&self, cell: &Cell) -> String {
        match self.ios(cell) {
            Some(ios) => format!("--io_size=1T --number_ios={ios}"),
            None => format!("--time_based --runtime={}ms", self.limit().as_millis()),
        }
    }
}

/// Runs fio, with options for what it works on and for how long. Also returns the number of I/Os.
pub fn fio(cell: &Cell, target: &str, length: &str) -> Outcome<(Told, u64)> {
    let Work::Fio {
        arguments,
        block,
        depth,
    } = cell.work
    else {
        return Err("that is not fio's".into());
    };
    let mut command = format!(
        "fio --name=j --direct=1 --ioengine=libaio {arguments} {target} \
         --iodepth={depth} --size={REGION_MIB}M --output-format=json {length}"
    );
    if block > 0 {
        command += &format!(" --bs={block}");
    }
    let said = sh(&command)?;
    // Programs that it loads may say something first.
    let json = said.find('{').map_or("", |at| &said[at..]);
    let report: Value = serde_json::from_str(json)?;
    Told::by_fio(&report["jobs"][0]).ok_or_else(|| format!("{command}: {said}").into())
}

pub fn sample(
    mode: Mode,
    client: Client,
    setting: Setting,
    cell: &Cell,
    round: u32,
    told: Told,
) -> Sample {
    Sample {
        mode,
        client,
        setting: setting.name(),
        cell: cell.name.to_owned(),
        round,
        ns_per_io: told.ns_per_io,
        mib_per_s: told.mib_per_s,
        p50_us: told.p50_us,
        p99_us: told.p99_us,
        cpu_us_per_io: told.cpu_us_per_io,
        kernel_threads_us_per_io: None,
    }
}

/// What the program that did the I/O tells of it.
pub struct Told {
    ns_per_io: f64,
    mib_per_s: f64,
    p50_us: Option<f64>,
    p99_us: Option<f64>,
    /// The program's own.
    cpu_us_per_io: Option<f64>,
}

impl Told {
    pub fn of(time: Duration, ios: u64, bytes: u64) -> Self {
        Self {
            ns_per_io: time.as_nanos() as f64 / ios as f64,
            mib_per_s: bytes as f64 / time.as_secs_f64() / f64::from(1 << 20),
            p50_us: None,
            p99_us: None,
            cpu_us_per_io: None,
        }
    }

    /// Leaves out time in which nothing was done for these I/Os.
    pub fn leave_out(&mut self, idle_ns: f64, ios: u64) {
        self.ns_per_io -= idle_ns / ios as f64;
    }

    fn by_fio(job: &Value) -> Option<(Self, u64)> {
        let number = |of: &Value, name: &str| of[name].as_f64();
        let sum = |name: &str| Some(number(&job["read"], name)? + number(&job["write"], name)?);
        let most = |of: &dyn Fn(&Value) -> Option<f64>| {
            Some(of(&job["read"])?.max(of(&job["write"]).unwrap_or(0.0)))
        };
        let ios = sum("total_ios")?;
        let runtime_ms = most(&|direction| number(direction, "runtime"))?;
        let percentile = |which: &str| {
            let of = |direction: &Value| {
                Some(
                    direction["clat_ns"]["percentile"][which]
                        .as_f64()
                        .unwrap_or(0.0),
                )
            };
            most(&of).map(|ns| ns / 1e3)
        };
        let busy = (number(job, "usr_cpu")? + number(job, "sys_cpu")?) / 100.0;
        let told = Self {
            ns_per_io: runtime_ms * 1e6 / ios,
            mib_per_s: sum("bw_bytes")? / f64::from(1 << 20),
            p50_us: percentile("50.000000"),
            p99_us: percentile("99.000000"),
            cpu_us_per_io: Some(busy * runtime_ms * 1e3 / ios),
        };
        (ios > 0.0 && runtime_ms > 0.0).then_some((told, ios as u64))
    }
}

/// What the file system's cell unpacks. udev's database of hardware would be more than all else.
fn make_tree() -> Outcome<()> {
    sh("tar -cf /tmp/tree.tar --exclude='*hwdb*' -C / etc usr/sbin usr/lib/udev").map(drop)
}

/// Has the programs of the file system's cell read from the disk, which would count against who is
/// measured first.
fn warm_up() -> Outcome<()> {
    sh(&format!(
        "truncate -s {REGION_MIB}M /tmp/image && mkfs.ext4 -q -F /tmp/image && rm /tmp/image
         mount -t tmpfs none /mnt && tar -xf /tmp/tree.tar -C /mnt && sync && umount /mnt"
    ))
    .map(drop)
}

fn file_system(device: &str, options: &str) -> Outcome<Told> {
    let start = Instant::now();
    sh(&format!(
        "mkfs.ext4 -q -F {options} {device} && mount {device} /mnt && tar -xf /tmp/tree.tar -C /mnt
         sync && umount /mnt"
    ))?;
    let bytes = fs::metadata("/tmp/tree.tar")?.len();
    Ok(Told::of(start.elapsed(), 1, bytes))
}

/// Time that the processors spent so far.
struct Processors {
    kernel_threads_us: f64,
    server_us: f64,
}

impl Processors {
    fn now(server: &Server) -> Outcome<Self> {
        let mut kernel_threads_us = 0.0;
        for entry in fs::read_dir("/proc")? {
            let path = entry?.path();
            // A process may go meanwhile.
            let Ok(stat) = fs::read_to_string(path.join("stat")) else {
                continue;
            };
            if programs::is_kernel_thread(&stat) {
                kernel_threads_us += programs::run_time_us(&path).unwrap_or(0.0);
            }
        }
        Ok(Self {
            kernel_threads_us,
            server_us: server.run_time_us()?,
        })
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            kernel_threads_us: self.kernel_threads_us - before.kernel_threads_us,
            server_us: self.server_us - before.server_us,
        }
    }
}
