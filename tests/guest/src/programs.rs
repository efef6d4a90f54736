// SPDX-License-Identifier: GPL-2.0

//! Runs real programs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process};

use crate::debug_kernel::patient;

/// Runs a shell script that must succeed, and answers what it said.
pub fn sh(script: &str) -> String {
    try_sh(script).unwrap_or_else(|failure| panic!("{failure}"))
}

/// Runs a shell script; what it said is in the answer either way.
pub fn try_sh(script: &str) -> Result<String, String> {
    let output = Command::new("sh")
        .args(["-e", "-c", &format!("exec 2>&1\n{script}")])
        .stdin(Stdio::null())
        .output()
        .expect("sh");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        Ok(said)
    } else {
        Err(format!("{script}\n{}: {said}", output.status))
    }
}

/// A program that runs until it is dropped.
pub struct Daemon {
    child: Child,
    said: File,
}

impl Daemon {
    pub fn start(command: &str) -> Self {
        let words: Vec<&str> = command.split_whitespace().collect();
        let said = memfd_create("output", MemfdFlags::CLOEXEC)
            .map(File::from)
            .expect("a memfd");
        let child = Command::new(words[0])
            .args(&words[1..])
            .stdin(Stdio::null())
            .stdout(said.try_clone().expect("dup"))
            .stderr(said.try_clone().expect("dup"))
            .spawn();
        let child = child.unwrap_or_else(|error| panic!("{command}: {error}"));
        Self { child, said }
    }

    /// Its output so far.
    pub fn said(&self) -> String {
        let len = self.said.metadata().expect("a memfd").len();
        let mut said = vec![0; len as usize];
        let len = self.said.read_at(&mut said, 0).expect("to read a memfd");
        String::from_utf8_lossy(&said[..len]).into_owned()
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        self.signal(Signal::TERM);
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("kill");
    }

    /// Waits for it to end by itself, and answers whether it was content.
    pub fn wait(&mut self, limit: Duration) -> bool {
        self.wait_while(limit, || ())
    }

    /// As [`Self::wait()`], but as long as `progress` changes at least once within `limit`.
    pub fn wait_while<T: PartialEq>(
        &mut self,
        limit: Duration,
        mut progress: impl FnMut() -> T,
    ) -> bool {
        let limit = patient(limit);
        let (mut last, mut since) = (progress(), Instant::now());
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status.success();
            }
            let now = progress();
            if now != last {
                (last, since) = (now, Instant::now());
            }
            assert!(
                since.elapsed() <= limit,
                "a program did not end within {limit:?}; it said: {}",
                self.said()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}
