// SPDX-License-Identifier: GPL-2.0
//! What user space sets up for a device, whichever front end it uses: sizes, flags, sockets, and the
//! session's start and end (`struct nbd_config`).

#![forbid(unsafe_code)]

use crate::{
    kapi::{
        disk::{File, Sectors},
        limits::{valid_block_size, Features},
        sock::{BadSocket, Ending, Socket},
        task::{self, ModuleRef, TaskId},
    },
    pure::proto::flags,
    rnbd_debugfs::{self, Files, Shown},
    rnbd_dev::{Device, State, DEFAULT_TIMEOUT_SECONDS, QUEUE_DEPTH},
    rnbd_session::{Options, Session},
    rnbd_sock,
};
use kernel::{
    prelude::*,
    str::CString,
    sync::{
        atomic::{Atomic, Relaxed},
        Arc, MutexGuard,
    },
};

/// The block size until one is set (`NBD_DEF_BLKSIZE_BITS`).
const DEFAULT_BLOCK_BYTES: u32 = 1024;

/// The longest that a timer can be set for (`MAX_JIFFY_OFFSET`, as far as 32 bits hold it).
const MAX_JIFFIES: u32 = u32::MAX / 4;

/// `NBD_CFLAG_DESTROY_ON_DISCONNECT`
const CFLAG_DESTROY_ON_DISCONNECT: u64 = 1 << 0;
/// `NBD_CFLAG_DISCONNECT_ON_CLOSE`
const CFLAG_DISCONNECT_ON_CLOSE: u64 = 1 << 1;

/// What user space has set up, from the first open to the last close (`struct nbd_config`).
pub(crate) struct Config {
    /// Opens, and the connection that netlink made.
    pub(crate) references: u32,
    /// `NBD_FLAG_*`.
    flags: u32,
    pub(crate) size_bytes: u64,
    block_bytes: u32,
    sockets: KVec<Socket>,
    /// The task that hands over sockets: no other may.
    setup_by: Option<TaskId>,
    /// The device was started; it is not started again before the last close.
    pub(crate) started: bool,
    /// The session, from its start to the last close.
    pub(crate) session: Option<Arc<Session>>,
    disconnect_requested: bool,
    /// Set up by netlink: ioctls may only end it (`NBD_RT_BOUND`).
    bound: bool,
    /// Netlink holds a reference (`NBD_RT_HAS_CONFIG_REF`).
    held_by_netlink: bool,
    /// The last close disconnects (`NBD_RT_DISCONNECT_ON_CLOSE`).
    pub(crate) disconnect_on_close: bool,
    pub(crate) has_backend_file: bool,
    /// What debugfs shows of the session, and the files there.
    shown: Option<Arc<Shown>>,
    debugfs: Option<Files>,
    dead_timeout_jiffies: u64,
    _module: ModuleRef,
}

/// What netlink asks for: absent things stay as they are.
#[derive(Default)]
pub(crate) struct Request<'a> {
    pub(crate) size_bytes: Option<u64>,
    pub(crate) block_bytes: Option<u64>,
    pub(crate) timeout_seconds: Option<u64>,
    pub(crate) dead_timeout_seconds: Option<u64>,
    pub(crate) server_flags: Option<u64>,
    pub(crate) client_flags: Option<u64>,
    pub(crate) sockets: KVec<u32>,
    pub(crate) backend: Option<&'a [u8]>,
}

impl Config {
    /// Nothing is set up. Whoever makes it has the one reference.
    ///
    /// # Errors
    ///
    /// `ENODEV` where the module is about to go.
    pub(crate) fn new() -> Result<Self> {
        Ok(Config {
            references: 1,
            flags: 0,
            size_bytes: 0,
            block_bytes: DEFAULT_BLOCK_BYTES,
            sockets: KVec::new(),
            setup_by: None,
            started: false,
            session: None,
            disconnect_requested: false,
            bound: false,
            held_by_netlink: false,
            disconnect_on_close: false,
            has_backend_file: false,
            shown: None,
            debugfs: None,
            dead_timeout_jiffies: 0,
            _module: ModuleRef::get().ok_or(ENODEV)?,
        })
    }

    /// nbd.c's `nbd_disconnected()`
    pub(crate) fn is_disconnected(&self) -> bool {
        let ended = |s: &Arc<Session>| s.table().fate.see().is_disconnected();
        self.session
            .as_ref()
            .map_or(self.disconnect_requested, ended)
    }

    /// Removes the files in debugfs. Waits for their readers.
    pub(crate) fn hide(&mut self) {
        self.debugfs = None;
    }

    /// The sockets, where no session has taken them over. One that another device uses is not ours.
    fn idle_sockets(&self) -> impl Iterator<Item = &Socket> {
        let idle = self.session.is_none();
        self.sockets.iter().filter(move |s| idle && !s.is_hooked())
    }

    /// Ends the session, or the connections of sockets that none has taken over (`sock_shutdown()`).
    /// May sleep.
    pub(crate) fn end(&self) {
        if let Some(session) = &self.session {
            session.end();
        }
        for socket in self.idle_sockets() {
            socket.end(Ending::Polite);
        }
    }

    /// Whether it was set up by netlink.
    pub(crate) fn is_bound(&self) -> bool {
        self.bound
    }
}

// The steps of either front end.

impl Device {
    /// Adds a socket to the ones that the device will use (`nbd_add_socket()`).
    ///
    /// # Errors
    ///
    /// `EINVAL` for something that is no TCP or UNIX stream socket, `ENOTCONN` for one that is no
    /// connection and was none, `EBADF`, `ENOTSOCK`, `EBUSY` where the device was started or another task
    /// sets it up, `ENOMEM`.
    pub(crate) fn add_socket(&self, fd: usize) -> Result {
        let fd = i32::try_from(fd).map_err(|_| EINVAL)?;
        self.with_config(|config| {
            if config.started {
                pr_err!(
                    "nbd{}: cannot add a socket to a running device\n",
                    self.index
                );
                return Err(EBUSY);
            }
            let socket = self.socket_from_fd(fd)?;
            let me = TaskId::current();
            if *config.setup_by.get_or_insert(me) != me {
                pr_err!("nbd{}: being set up by another task\n", self.index);
                return Err(EBUSY);
            }
            Ok(config.sockets.push(socket, GFP_KERNEL)?)
        })
    }

    fn socket_from_fd(&self, fd: i32) -> Result<Socket> {
        Socket::from_fd(fd).map_err(|e| match e {
            BadSocket::Fd(errno) => errno,
            BadSocket::Kind => {
                pr_err!(
                    "nbd{}: unsupported socket: should be TCP or UNIX\n",
                    self.index
                );
                EINVAL
            }
            BadSocket::NotConnected => {
                pr_err!("nbd{}: unsupported socket: not connected\n", self.index);
                ENOTCONN
            }
        })
    }

    /// Sets the size, in bytes.
    pub(crate) fn set_size_bytes(&self, size_bytes: usize) -> Result {
        self.with_config(|config| self.set_size(config, size_bytes as u64, config.block_bytes))
    }

    /// Sets the size, in blocks of the size that was set.
    pub(crate) fn set_size_blocks(&self, blocks: usize) -> Result {
        self.with_config(|config| {
            let size_bytes = (blocks as u64)
                .checked_mul(u64::from(config.block_bytes))
                .ok_or(EINVAL)?;
            self.set_size(config, size_bytes, config.block_bytes)
        })
    }

    /// Sets the block size, in bytes; 0 is the default.
    pub(crate) fn set_block_bytes(&self, bytes: usize) -> Result {
        let bytes = checked_block_bytes(bytes as u64)?;
        self.with_config(|config| self.set_size(config, config.size_bytes, bytes))
    }

    /// `nbd_set_size()`: remembers it, and tells the block layer where the device runs.
    ///
    /// # Errors
    ///
    /// `EINVAL`; `EBUSY` where the block size is to change and what is in flight does not end, or somebody
    /// who waits for that changes other limits.
    fn set_size(&self, config: &mut Config, size_bytes: u64, block_bytes: u32) -> Result {
        if i64::try_from(size_bytes).is_err() {
            return Err(EINVAL);
        }
        if config.started {
            self.set_limits(config, block_bytes)?;
        }
        config.size_bytes = size_bytes;
        config.block_bytes = block_bytes;
        if !config.started {
            return Ok(());
        }
        if let Some(shown) = &config.shown {
            shown.size_bytes.store(size_bytes, Relaxed);
            shown.block_bytes.store(block_bytes, Relaxed);
        }
        self.scan_partitions_later();
        let told = self.disk.set_capacity_and_notify(Sectors(size_bytes >> 9));
        if !told {
            self.disk.uevent_change();
        }
        Ok(())
    }

    fn set_limits(&self, config: &Config, block_bytes: u32) -> Result {
        let set = self.disk.set_limits(features(config.flags), block_bytes);
        set.inspect_err(|e| {
            if *e == EBUSY {
                pr_err!(
                    "nbd{}: cannot change the block size while requests get no answer\n",
                    self.index
                );
            }
        })
    }

    /// Sets how long a request may take; 0 is for ever (`nbd_set_cmd_timeout()`).
    pub(crate) fn set_timeout_seconds(&self, seconds: usize) -> Result {
        self.apply_timeout(&mut self.lock(), seconds as u64);
        Ok(())
    }

    fn apply_timeout(&self, state: &mut State, seconds: u64) {
        // What is longer than the block layer can wait is as good as for ever, and not zero.
        let jiffies = seconds.saturating_mul(u64::from(task::HZ));
        let jiffies = u32::try_from(jiffies).map_or(MAX_JIFFIES, |j| j.min(MAX_JIFFIES));
        state.timeout_jiffies = jiffies;
        self.disk.set_request_timeout(match seconds {
            0 => DEFAULT_TIMEOUT_SECONDS * task::HZ,
            _ => jiffies,
        });
        let session = state.config.as_ref().and_then(|c| c.session.as_ref());
        if let Some(session) = session {
            session.table().set_timeout_jiffies(jiffies);
        }
    }

    /// Sets what the server can do. Taken up when the device starts or its size is set.
    pub(crate) fn set_flags(&self, flags: usize) -> Result {
        self.with_config(|config| {
            config.flags = flags as u32;
            Ok(())
        })
    }

    /// Asks the servers to end the session. May sleep.
    pub(crate) fn disconnect(&self) -> Result {
        self.with_config(|config| {
            self.say_goodbye(config);
            Ok(())
        })
    }

    /// `nbd_disconnect()`
    fn say_goodbye(&self, config: &mut Config) {
        pr_info!("nbd{}: NBD_DISCONNECT\n", self.index);
        self.life.lock().disconnect_requested = true;
        config.disconnect_requested = true;
        if let Some(session) = &config.session {
            session.say_goodbye();
            return;
        }
        for socket in config.idle_sockets() {
            if let Err(e) = rnbd_sock::say_goodbye_on(socket) {
                pr_err!("nbd{}: send disconnect failed ({e:?})\n", self.index);
            }
        }
    }

    /// Ends the session at once, and forgets the sockets (`nbd_clear_sock_ioctl()`). May sleep.
    pub(crate) fn clear_sockets(&self) -> Result {
        let put = self.with_config(|config| {
            config.end();
            config.sockets = KVec::new();
            config.setup_by = None;
            self.disk.force_media_change();
            // Under the lock: who returns from NBD_DO_IT has not closed the device yet, and counts.
            self.reset_size();
            Ok(core::mem::take(&mut config.held_by_netlink))
        })?;
        if put {
            self.put_config();
        }
        Ok(())
    }

    /// `nbd_bdev_reset()`
    fn reset_size(&self) {
        if self.disk.openers() <= 1 {
            self.disk.set_capacity(Sectors(0));
        }
    }
}

// Start and end.

impl Device {
    /// Runs a session until its last connection has gone, or a signal comes (`NBD_DO_IT`,
    /// `nbd_start_device_ioctl()`).
    ///
    /// # Errors
    ///
    /// `EBUSY` where the device was started already or a socket is in use elsewhere, `EINVAL` without a
    /// socket or with several that the server does not allow, `ERESTARTSYS` after a signal.
    pub(crate) fn run(&self) -> Result {
        let session = self.start(self.lock())?;
        self.scan_partitions_later();
        let signal = session.table().wait_gone_or_signal();
        if signal {
            session.end();
        }
        self.with_config(|_| {
            self.reset_size();
            Ok(())
        })?;
        if signal {
            return Err(ERESTARTSYS);
        }
        Ok(())
    }

    /// `nbd_start_device()`
    fn start(&self, mut state: MutexGuard<'_, State>) -> Result<Arc<Session>> {
        let sockets = self.check_startable(state.config_mut()?)?;
        let mut state = self.set_hw_queues(state, sockets as u32);
        let timeout_jiffies = state.timeout_jiffies;
        let config = state.config_mut()?;
        let session = self.start_locked(config, timeout_jiffies)?;
        // They are the session's now, which lets go of those that are replaced.
        config.sockets = KVec::new();
        // Whoever ends it next lets go of this, too.
        config.held_by_netlink = config.bound;
        Ok(session)
    }

    /// With how many sockets the device can be started.
    fn check_startable(&self, config: &Config) -> Result<usize> {
        if config.started {
            return Err(EBUSY);
        }
        if config.sockets.is_empty() {
            return Err(EINVAL);
        }
        if config.sockets.len() > 1 && config.flags & flags::CAN_MULTI_CONN == 0 {
            pr_err!(
                "nbd{}: the server does not support several connections for a device\n",
                self.index
            );
            return Err(EINVAL);
        }
        Ok(config.sockets.len())
    }

    fn start_locked(&self, config: &mut Config, timeout_jiffies: u32) -> Result<Arc<Session>> {
        let options = Options {
            device: self.index,
            shared: self.shared.clone(),
            hw_queues: self.disk.hw_queues(),
            depth: QUEUE_DEPTH,
            flags: config.flags,
            timeout_jiffies,
            dead_timeout_jiffies: config.dead_timeout_jiffies,
        };
        let session = Session::new(&self.disk, &config.sockets, options)?;
        if let Err(e) = self.show(config, &session) {
            session.end();
            return Err(e);
        }
        session.begin();
        Ok(session)
    }

    /// Publishes a session, and shows it to user space.
    fn show(&self, config: &mut Config, session: &Arc<Session>) -> Result {
        self.add_file(File::Pid).inspect_err(|_| {
            pr_err!("nbd{}: cannot make the file pid\n", self.index);
        })?;
        config.started = true;
        config.session = Some(session.clone());
        self.pid.store(task::current_pid(), Relaxed);
        if config.disconnect_requested {
            session.table().fate.request_disconnect();
        }
        let shown = Arc::new(
            Shown {
                pid: task::current_pid(),
                session: session.clone(),
                flags: config.flags,
                size_bytes: Atomic::new(config.size_bytes),
                block_bytes: Atomic::new(config.block_bytes),
            },
            GFP_KERNEL,
        )?;
        // As nbd.c: without these files the device works all the same.
        config.debugfs = rnbd_debugfs::show(&self.debugfs, self.index, shown.clone()).ok();
        config.shown = Some(shown);
        self.disk
            .set_read_only(config.flags & flags::READ_ONLY != 0);
        self.session.publish(session.clone()).map_err(|_| EBUSY)?;
        self.set_size(config, config.size_bytes, config.block_bytes)
    }

    /// Disconnects, waits until nothing of the session runs, and lets go of what netlink holds
    /// (`nbd_disconnect_and_put()`). May sleep.
    pub(crate) fn disconnect_and_put(&self) {
        // In one step: what comes afterwards is another session. It can only fail where there is none.
        let put = self.with_config(|config| {
            self.say_goodbye(config);
            config.end();
            config.setup_by = None;
            config.bound = false;
            Ok(core::mem::take(&mut config.held_by_netlink))
        });
        if put.unwrap_or(false) {
            self.put_config();
        }
    }
}

// What netlink does in one step.

impl Device {
    /// Sets it up and starts it (`nbd_genl_connect()`). Returns whether it did: it does not where somebody
    /// uses the device, or it is about to be removed. May sleep.
    ///
    /// # Errors
    ///
    /// Those of the steps; `EBUSY` where a socket is in use elsewhere.
    pub(crate) fn connect(&self, request: &Request<'_>) -> Result<bool> {
        let mut state = self.lock();
        if state.config.is_some() {
            return Ok(false);
        }
        match self.new_config(&mut state) {
            Ok(config) => config.bound = true,
            Err(e) if e == ENXIO => return Ok(false),
            Err(e) => return Err(e),
        }
        // The lock is held from here until the device has started: in between it would look as if it were
        // connected, and as if it could be disconnected.
        let set_up = self.set_up(&mut state, request);
        let started = set_up.and_then(|()| self.start(state));
        started.map(|_| true).inspect_err(|_| self.put_config())
    }

    /// All that comes before the start.
    fn set_up(&self, state: &mut State, request: &Request<'_>) -> Result {
        self.apply(state, request)?;
        let config = state.config_mut()?;
        if let Some(flags) = request.server_flags {
            config.flags = flags as u32;
        }
        for fd in &request.sockets {
            let fd = i32::try_from(*fd).map_err(|_| EINVAL)?;
            let socket = self.socket_from_fd(fd)?;
            config.sockets.push(socket, GFP_KERNEL)?;
        }
        if let Some(backend) = request.backend {
            *self.backend.lock() = Some(c_string(backend)?);
        }
        self.add_file(File::Backend)?;
        config.has_backend_file = true;
        Ok(())
    }

    /// What connect and reconfigure have in common.
    fn apply(&self, state: &mut State, request: &Request<'_>) -> Result {
        let config = state.config.as_mut().ok_or(ENODEV)?;
        let size_bytes = request.size_bytes.unwrap_or(config.size_bytes);
        let block_bytes = match request.block_bytes {
            Some(bytes) if bytes != u64::from(config.block_bytes) => checked_block_bytes(bytes)?,
            _ => config.block_bytes,
        };
        if size_bytes != config.size_bytes || block_bytes != config.block_bytes {
            self.set_size(config, size_bytes, block_bytes)?;
        }
        if let Some(seconds) = request.dead_timeout_seconds {
            config.dead_timeout_jiffies = seconds.saturating_mul(u64::from(task::HZ));
            if let Some(session) = &config.session {
                session.set_dead_timeout_jiffies(config.dead_timeout_jiffies);
            }
        }
        if let Some(flags) = request.client_flags {
            config.disconnect_on_close = flags & CFLAG_DISCONNECT_ON_CLOSE != 0;
            let destroy = flags & CFLAG_DESTROY_ON_DISCONNECT != 0;
            self.life.lock().destroy_on_disconnect = destroy;
        }
        if let Some(seconds) = request.timeout_seconds {
            self.apply_timeout(state, seconds);
        }
        Ok(())
    }

    /// Changes a device that netlink has connected, and puts sockets in the place of dead connections
    /// (`nbd_genl_reconfigure()`). May sleep.
    ///
    /// # Errors
    ///
    /// `EINVAL` where it is not connected by netlink or the image is another one, and those of the
    /// steps.
    pub(crate) fn reconfigure(&self, request: &Request<'_>) -> Result {
        let mut state = self.lock();
        // What an allocation would have written out to make room may wait for this very device.
        task::without_io(|| self.reconfigure_locked(&mut state, request))
    }

    fn reconfigure_locked(&self, state: &mut State, request: &Request<'_>) -> Result {
        if let Some(backend) = &*self.backend.lock() {
            if request.backend != Some(backend.to_bytes()) {
                pr_err!("nbd{}: the backend is not {backend:?}\n", self.index);
                return Err(EINVAL);
            }
        }
        let ready = |c: &KBox<Config>| c.bound && c.started;
        if !state.config.as_ref().is_some_and(ready) {
            pr_err!("nbd{}: not configured, cannot reconfigure\n", self.index);
            return Err(EINVAL);
        }
        self.apply(state, request)?;
        let session = state.config.as_ref().and_then(|c| c.session.clone());
        let session = session.ok_or(EINVAL)?;
        for fd in &request.sockets {
            let socket = self.socket_from_fd(*fd as i32)?;
            if !session.reconnect(&self.disk, &socket, self.stuck_jiffies)? {
                break;
            }
        }
        Ok(())
    }
}

/// A copy of `bytes`, whatever they are, up to the first zero (`nla_strdup()`, as C reads what that makes).
fn c_string(bytes: &[u8]) -> Result<CString> {
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or(&[]);
    let mut terminated = KVec::with_capacity(text.len() + 1, GFP_KERNEL)?;
    terminated.extend_from_slice(text, GFP_KERNEL)?;
    terminated.push(0, GFP_KERNEL)?;
    let text = CStr::from_bytes_with_nul(&terminated).map_err(|_| EINVAL)?;
    Ok(CString::try_from(text)?)
}

/// A block size that the block layer takes; 0 is the default.
fn checked_block_bytes(bytes: u64) -> Result<u32> {
    let bytes = match bytes {
        0 => u64::from(DEFAULT_BLOCK_BYTES),
        bytes => bytes,
    };
    let small = usize::try_from(bytes).map_err(|_| EINVAL)?;
    if !valid_block_size(small) {
        return Err(EINVAL);
    }
    u32::try_from(bytes).map_err(|_| EINVAL)
}

/// What the disk can do with such a server (`nbd_apply_limits()`).
fn features(flags: u32) -> Features {
    let has = |flag| flags & flag != 0;
    Features {
        write_cache: has(flags::SEND_FLUSH),
        fua: has(flags::SEND_FLUSH) && has(flags::SEND_FUA),
        rotational: has(flags::ROTATIONAL),
        discard: has(flags::SEND_TRIM),
        write_zeroes: has(flags::SEND_WRITE_ZEROES),
    }
}
