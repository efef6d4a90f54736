// SPDX-License-Identifier: GPL-2.0

//! Starts what a measurement needs: drivers, servers, fio.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::Outcome;
use crate::matrix::{REGION_MIB, Setting};
use crate::remote;
use crate::sample::Client;

pub const DEVICE: &str = "/dev/nbd0";
pub const PORT: u16 = 10809;
pub const SOCKET: &str = "/tmp/bench.sock";

/// Runs a shell script that must succeed, and answers what it said.
pub fn sh(script: &str) -> Outcome<String> {
    let output = Command::new("sh")
        .args(["-e", "-c", script])
        .stdin(Stdio::null())
        .output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{script}: {}: {said}", output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// The first number of the line that `rest_of` finds.
pub fn number(path: &str, rest_of: impl Fn(&str) -> Option<&str>) -> Outcome<f64> {
    let text = fs::read_to_string(path)?;
    let rest = text.lines().find_map(rest_of);
    let number = rest.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    number.ok_or_else(|| format!("{path} is not as expected").into())
}

fn wait_for(what: &str, mut there: impl FnMut() -> bool) -> Outcome<()> {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !there() {
        if Instant::now() > deadline {
            return Err(format!("waited in vain for {what}").into());
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// A driver's module, loaded until dropped.
pub struct Module(&'static str);

impl Module {
    /// With one device.
    pub fn load(client: Client) -> Outcome<Self> {
        Self::load_with(client, 1)
    }

    pub fn load_with(client: Client, devices: usize) -> Outcome<Self> {
        let (load, name) = match client {
            Client::Nbd => ("modprobe nbd", "nbd"),
            Client::Rnbd => ("insmod /rnbd/rnbd.ko", "rnbd"),
            Client::Fio | Client::Floor | Client::Sendfile => {
                return Err("that is no driver".into());
            }
        };
        sh(&format!("{load} nbds_max={devices}"))?;
        Ok(Self(name))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        // What was just closed may hold it a moment longer.
        let unloaded = wait_for("the module to go", || {
            sh(&format!("rmmod {}", self.0)).is_ok()
        });
        if let Err(error) = unloaded {
            eprintln!("{error}");
        }
    }
}

/// A disk in the guest's memory, until dropped.
pub struct RamDisk;

impl RamDisk {
    pub const DEVICE: &str = "/dev/ram0";

    /// As large as the region, and all of it written.
    pub fn new() -> Outcome<Self> {
        sh(&format!(
            "modprobe brd rd_nr=1 rd_size={}",
            REGION_MIB << 10
        ))?;
        let disk = Self;
        fill(Self::DEVICE)?;
        Ok(disk)
    }
}

impl Drop for RamDisk {
    fn drop(&mut self) {
        if let Err(error) = sh("rmmod brd") {
            eprintln!("{error}");
        }
    }
}

/// Writes the whole region once, so that reads are of something.
pub fn fill(device: &str) -> Outcome<()> {
    sh(&format!(
        "dd if=/dev/zero of={device} bs=1M count={REGION_MIB} oflag=direct 2>&1"
    ))
    .map(drop)
}

/// A server that runs until dropped.
pub struct Server(Child);

impl Server {
    pub fn start(setting: Setting) -> Outcome<Self> {
        let _ = fs::remove_file(SOCKET);
        let mut command = if setting.instant {
            let mut command = Command::new(std::env::current_exe()?);
            command.arg("serve");
            if setting.unix {
                command.arg(SOCKET);
            } else {
                command.arg(format!("127.0.0.1:{PORT}"));
            }
            command
        } else {
            let mut command = Command::new("nbdkit");
            command.arg("-f");
            if setting.unix {
                command.args(["-U", SOCKET]);
            } else {
                command.args(["-i", "127.0.0.1", "-p", &PORT.to_string()]);
            }
            command.args(["memory", &format!("{REGION_MIB}M")]);
            command
        };
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        let server = Self(child);
        wait_for("the server", || match setting.unix {
            true => Path::new(SOCKET).exists(),
            false => sh(&format!("ss -Hltn sport = :{PORT}")).is_ok_and(|said| !said.is_empty()),
        })?;
        Ok(server)
    }
}

impl Server {
    /// What its threads have run so far.
    pub fn run_time_us(&self) -> Outcome<f64> {
        let mut sum = 0.0;
        for task in fs::read_dir(format!("/proc/{}/task", self.0.id()))? {
            sum += run_time_us(&task?.path()).unwrap_or(0.0);
        }
        Ok(sum)
    }

    /// What is resident of it.
    pub fn memory_kib(&self) -> Outcome<f64> {
        let path = format!("/proc/{}/status", self.0.id());
        number(&path, |line| line.strip_prefix("VmRSS:"))
    }
}

/// Whether `/proc/PID/stat` is a kernel thread's.
pub fn is_kernel_thread(stat: &str) -> bool {
    const PF_KTHREAD: u64 = 0x0020_0000;
    // Behind the name, which may have anything in it: state, five numbers, flags.
    let flags = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.split_whitespace().nth(6));
    flags.is_some_and(|flags| flags.parse::<u64>().unwrap_or(0) & PF_KTHREAD != 0)
}

/// What the thread with this directory in `/proc` has run so far.
pub fn run_time_us(directory: &Path) -> Option<f64> {
    let text = fs::read_to_string(directory.join("schedstat")).ok()?;
    Some(text.split_whitespace().next()?.parse::<f64>().ok()? / 1e3)
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The device, connected until dropped.
pub struct Connected;

impl Connected {
    pub fn connect(setting: Setting) -> Outcome<Self> {
        let address = if setting.unix {
            format!("-unix {SOCKET}")
        } else if setting.remote.is_some() {
            format!("{} {PORT}", remote::SERVER)
        } else {
            format!("127.0.0.1 {PORT}")
        };
        sh(&format!(
            "nbd-client {address} {DEVICE} -C {}",
            setting.connections
        ))?;
        let connected = Self;
        wait_for("the device", || {
            fs::read_to_string("/sys/block/nbd0/size")
                .is_ok_and(|size| size.trim() == (REGION_MIB * 2048).to_string())
        })?;
        Ok(connected)
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        if let Err(error) = sh(&format!("nbd-client -d {DEVICE}")) {
            eprintln!("{error}");
        }
    }
}
