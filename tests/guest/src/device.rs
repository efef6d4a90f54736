// SPDX-License-Identifier: GPL-2.0

//! A /dev/nbdN that is connected the way nbd-client's ioctl mode does it, to a [`Server`].

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::{Pid, gettid};

use crate::debug_kernel::patient;
use crate::driver::Driver;
use crate::harness::wait_until;
use crate::proto::{self, HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES};
use crate::server::{Server, Transport};
use crate::stacks;
use crate::sys::{self, SysResult, ioctl_number};

/// All that an ordinary server can do.
pub const USUAL_FLAGS: u64 = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_WRITE_ZEROES;

/// How long anything may take that needs no patience, on the stock kernel.
pub const SOON: Duration = Duration::from_secs(10);

/// The largest block size that this kernel lets a disk have (`BLK_MAX_BLOCK_SIZE`).
pub fn largest_block() -> u64 {
    let huge_pages = fs::exists("/sys/kernel/mm/transparent_hugepage").unwrap_or(false);
    if huge_pages { 65536 } else { 4096 }
}

/// How a device is to be connected.
#[derive(Clone)]
pub struct Plan {
    index: u32,
    size: u64,
    block_size: u64,
    flags: u64,
    timeout_seconds: u64,
    connections: usize,
    transport: Transport,
    send_buffer: Option<usize>,
    low_water: Option<u32>,
    hold: bool,
    persist: bool,
    compat: bool,
}

impl Plan {
    pub fn new(size: u64) -> Self {
        Self {
            index: 0,
            size,
            block_size: 512,
            flags: USUAL_FLAGS,
            timeout_seconds: 0,
            connections: 1,
            transport: Transport::Unix,
            send_buffer: None,
            low_water: None,
            hold: false,
            persist: false,
            compat: false,
        }
    }

    pub fn index(self, index: u32) -> Self {
        Self { index, ..self }
    }

    pub fn block_size(self, block_size: u64) -> Self {
        Self { block_size, ..self }
    }

    pub fn flags(self, flags: u64) -> Self {
        Self {
            flags: flags | HAS_FLAGS,
            ..self
        }
    }

    pub fn timeout(self, timeout_seconds: u64) -> Self {
        Self {
            timeout_seconds,
            ..self
        }
    }

    /// More than one makes the server one of several connections.
    pub fn connections(self, connections: usize) -> Self {
        let flags = if connections > 1 {
            self.flags | proto::CAN_MULTI_CONN
        } else {
            self.flags
        };
        Self {
            connections,
            flags,
            ..self
        }
    }

    pub fn transport(self, transport: Transport) -> Self {
        Self { transport, ..self }
    }

    /// SO_SNDBUF of the client's sockets.
    pub fn send_buffer(self, bytes: usize) -> Self {
        Self {
            send_buffer: Some(bytes),
            ..self
        }
    }

    /// SO_RCVLOWAT of the client's sockets.
    pub fn low_water(self, bytes: u32) -> Self {
        Self {
            low_water: Some(bytes),
            ..self
        }
    }

    /// Lets the client do nothing after NBD_DO_IT until it is told to go on.
    pub fn hold(self) -> Self {
        Self { hold: true, ..self }
    }

    /// Makes the client close the device when NBD_DO_IT fails, without clearing it, as one does that is
    /// going to connect it again (nbd-client -persist).
    pub fn persist(self) -> Self {
        Self {
            persist: true,
            ..self
        }
    }

    /// Makes the client's ioctls those of a 32-bit process.
    pub fn compat(self) -> Self {
        Self {
            compat: true,
            ..self
        }
    }

    /// Connects to a new, honest server.
    pub fn attach(&self) -> Rig {
        self.attach_to(Server::new())
    }

    pub fn attach_to(&self, server: Server) -> Rig {
        let client = self.start(&server);
        client.wait_ready(self.size);
        let rig = Rig {
            server,
            client,
            index: self.index,
        };
        rig.server.forget_requests();
        rig
    }

    /// Connects, and does not wait for anything.
    pub fn start(&self, server: &Server) -> Client {
        let sockets = (0..self.connections).map(|_| self.socket(server)).collect();
        self.start_over(sockets)
    }

    /// As [`Self::start`], over connections that are there already.
    pub fn start_over(&self, sockets: Vec<OwnedFd>) -> Client {
        Client::start(self, sockets)
    }

    fn socket(&self, server: &Server) -> OwnedFd {
        let socket = server.connect(self.transport);
        if let Some(bytes) = self.send_buffer {
            rustix::net::sockopt::set_socket_send_buffer_size(&socket, bytes).expect("SO_SNDBUF");
        }
        if let Some(bytes) = self.low_water {
            let value = bytes.to_ne_bytes();
            sys::set_socket_option(&socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, &value)
                .expect("SO_RCVLOWAT");
        }
        socket
    }

    /// The ioctls before NBD_DO_IT, in nbd-client's order.
    fn set_up(&self, device: &File, sockets: &[OwnedFd]) -> SysResult<()> {
        self.ioctl(device, proto::SET_BLKSIZE, self.block_size)?;
        self.ioctl(device, proto::SET_SIZE_BLOCKS, self.size / self.block_size)?;
        self.ioctl(device, proto::CLEAR_SOCK, 0)?;
        self.ioctl(device, proto::SET_FLAGS, self.flags)?;
        self.ioctl(device, proto::SET_TIMEOUT, self.timeout_seconds)?;
        for socket in sockets {
            self.ioctl(device, proto::SET_SOCK, socket.as_fd().as_raw_fd() as u64)?;
        }
        Ok(())
    }

    fn ioctl(&self, device: &File, request: u32, argument: u64) -> SysResult {
        if self.compat {
            let argument = argument.try_into().expect("an argument of 32 bits");
            sys::ioctl_compat(device, request, argument)
        } else {
            ioctl_number(device, request, argument)
        }
    }
}

/// The thread that plays nbd-client.
pub struct Client {
    index: u32,
    /// What the driver knows it by.
    pub tid: Pid,
    done: Mutex<Receiver<SysResult>>,
    go_on: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    fn start(plan: &Plan, sockets: Vec<OwnedFd>) -> Self {
        let (say_tid, tid) = mpsc::channel();
        let (say_done, done) = mpsc::channel();
        let (go_on, told) = mpsc::channel::<()>();
        let plan = plan.clone();
        let (index, hold) = (plan.index, plan.hold);
        let life = move || {
            let device = open(plan.index, 0).expect("the device");
            plan.set_up(&device, &sockets)
                .expect("the ioctls before NBD_DO_IT");
            drop(sockets);
            say_tid.send(gettid()).unwrap();
            let answer = plan.ioctl(&device, proto::DO_IT, 0);
            let comes_back = plan.persist && answer == Err(Errno::PIPE);
            let _ = say_done.send(answer);
            let _ = told.recv();
            if comes_back {
                return;
            }
            plan.ioctl(&device, proto::CLEAR_QUE, 0)
                .expect("NBD_CLEAR_QUE");
            plan.ioctl(&device, proto::CLEAR_SOCK, 0)
                .expect("NBD_CLEAR_SOCK");
        };
        let thread = thread::Builder::new()
            .name("client".into())
            .spawn(life)
            .expect("a thread");
        let tid = tid.recv().expect("the device set up");
        Self {
            index,
            tid,
            done: Mutex::new(done),
            go_on: hold.then_some(go_on),
            thread: Some(thread),
        }
    }

    pub fn wait_ready(&self, size: u64) {
        wait_connected(self.index, self.tid, size);
    }

    /// Waits for NBD_DO_IT to return. Unless told to hold, the client goes on and is gone.
    pub fn wait(&mut self) -> SysResult {
        let answer = self
            .returned_within(patient(SOON))
            .expect("NBD_DO_IT to return");
        if self.go_on.is_none() {
            self.join();
        }
        answer
    }

    /// As [`Self::wait`], for an answer of [`lost`].
    pub fn wait_lost(&mut self) {
        assert_eq!(self.wait(), lost());
    }

    /// Whether NBD_DO_IT is still running `duration` later.
    pub fn still_runs_after(&self, duration: Duration) -> bool {
        self.returned_within(duration).is_err()
    }

    fn returned_within(&self, limit: Duration) -> Result<SysResult, RecvTimeoutError> {
        self.done.lock().unwrap().recv_timeout(limit)
    }

    /// Lets a client that holds clean up and close the device.
    pub fn go_on(&mut self) {
        self.go_on = None;
        self.join();
    }

    fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            // Its panic, if any, is a complaint already.
            let _ = thread.join();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.go_on = None;
        if self.thread.is_some() && self.returned_within(patient(SOON)).is_err() {
            sys::handle_and_ignore(libc::SIGUSR1, false);
            sys::signal_thread(self.tid, libc::SIGUSR1);
        }
        self.join();
    }
}

/// What NBD_DO_IT answers when all connections have ended and nobody has asked for that. The tests
/// of `do_it` and of `restart` name the difference.
pub fn lost() -> SysResult {
    match Driver::chosen() {
        Driver::Nbd => Ok(0),
        Driver::Rnbd => Err(Errno::PIPE),
    }
}

/// A server and a device that is connected to it.
pub struct Rig {
    pub server: Server,
    pub client: Client,
    pub index: u32,
}

impl Rig {
    /// Opens the device for buffered I/O.
    pub fn open(&self) -> File {
        open(self.index, 0).expect("the device")
    }

    pub fn open_to_read(&self) -> File {
        File::open(self.path()).expect("the device")
    }

    /// Opens the device for direct I/O.
    pub fn direct(&self) -> File {
        open(self.index, libc::O_DIRECT).expect("the device")
    }

    pub fn path(&self) -> String {
        format!("/dev/nbd{}", self.index)
    }

    /// What /sys/block/nbdN/`name` says.
    pub fn sysfs(&self, name: &str) -> String {
        sysfs(self.index, name)
    }

    /// Disconnects as an administrator does. The answer is NBD_DO_IT's.
    pub fn disconnect(&mut self) -> SysResult {
        ioctl_number(self.open_to_read(), proto::DISCONNECT, 0).expect("NBD_DISCONNECT");
        self.client.wait()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Sets free whoever waits for the server, so that the client ends.
        self.server.kill();
    }
}

/// Waits until device `index` is connected by `task`, and has had its partitions looked for.
pub fn wait_connected(index: u32, task: Pid, size: u64) {
    let sectors = (size / 512).to_string();
    let ready = wait_until(SOON, || {
        pid(index) == Some(task.as_raw_nonzero().get())
            && sysfs(index, "size") == sectors
            && stacks::sleeps(task)
    });
    let (pid, size) = (pid(index), sysfs(index, "size"));
    assert!(
        ready.is_ok(),
        "nbd{index} is not connected: pid {pid:?}, {size} sectors"
    );
    // The first to open a device does it.
    drop(File::open(format!("/dev/nbd{index}")).expect("the device"));
}

pub fn open(index: u32, flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(format!("/dev/nbd{index}"))
}

/// What /sys/block/nbdN/`name` says.
pub fn sysfs(index: u32, name: &str) -> String {
    let path = format!("/sys/block/nbd{index}/{name}");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.trim().to_owned()
}

/// The directory of a connected device in debugfs. rnbd makes it soon after the start.
pub fn debugfs(index: u32) -> String {
    let directory = format!("/sys/kernel/debug/nbd/nbd{index}");
    let last = format!("{directory}/flags");
    let complete = wait_until(SOON, || fs::exists(&last).unwrap_or(false));
    complete.unwrap_or_else(|()| panic!("{last} does not come"));
    directory
}

/// What /sys/block/nbdN/pid says, if it is there.
pub fn pid(index: u32) -> Option<i32> {
    let text = fs::read_to_string(format!("/sys/block/nbd{index}/pid")).ok()?;
    text.trim().parse().ok()
}

/// Connects device `index` anew and moves some data: whatever came before has done no harm.
pub fn assert_usable(index: u32) {
    let mut rig = Plan::new(1 << 20).index(index).attach();
    let direct = rig.direct();
    let written = sys::Buffer::filled(64 << 10, |data| pattern(7, 0, data));
    direct
        .write_all_at(&written, 128 << 10)
        .expect("to write after what came before");
    let mut read = sys::Buffer::new(written.len());
    direct
        .read_exact_at(&mut read, 128 << 10)
        .expect("to read after what came before");
    assert!(*read == *written, "the data of a later connection is wrong");
    drop(direct);
    assert_eq!(rig.disconnect(), Ok(0));
}

/// Fills `data`, which is to be at `offset`, with what `seed` says belongs there.
pub fn pattern(seed: u64, offset: u64, data: &mut [u8]) {
    assert!(offset % 8 == 0 && data.len() % 8 == 0);
    for (index, word) in data.chunks_exact_mut(8).enumerate() {
        let position = offset / 8 + index as u64;
        let mixed = (position ^ seed.rotate_left(40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&(mixed ^ (mixed >> 29)).to_le_bytes());
    }
}

/// Stores `len` bytes of the pattern of `seed` on the server, at `offset`.
pub fn store_pattern(server: &Server, seed: u64, offset: u64, len: usize) {
    let mut data = vec![0; len];
    pattern(seed, offset, &mut data);
    server.poke(offset, &data);
}

/// Reads 4 KiB at `offset`, and drops them.
pub fn read_page(device: &File, offset: u64) -> SysResult<()> {
    errno(device.read_exact_at(&mut sys::Buffer::new(4096), offset))
}

/// Asserts that `data`, read from `offset`, is what `seed` says belongs there.
pub fn assert_pattern(seed: u64, offset: u64, data: &[u8]) {
    let mut expected = vec![0; data.len()];
    pattern(seed, offset, &mut expected);
    if let Some(at) = data
        .iter()
        .zip(&expected)
        .position(|(got, want)| got != want)
    {
        panic!(
            "wrong data at {}, {at} bytes into a read at {offset}",
            offset + at as u64
        );
    }
}

/// The errno of a failed system call of std.
pub fn errno<T>(result: io::Result<T>) -> Result<T, Errno> {
    result.map_err(|error| Errno::from_io_error(&error).expect("an errno"))
}
