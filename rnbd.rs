// SPDX-License-Identifier: GPL-2.0
//! A network block device client, loaded in place of `nbd.ko`.
//!
//! The crate root: what is registered, in which order, and undone in reverse. `Documentation/design.rst`
//! tells how the parts fit together.

#![deny(unsafe_code)]

mod atomic;
#[allow(unsafe_code)]
mod kapi;
mod rnbd_cmd;
mod rnbd_config;
mod rnbd_debugfs;
mod rnbd_dev;
mod rnbd_events;
mod rnbd_fate;
mod rnbd_ioctl;
mod rnbd_netlink;
mod rnbd_proto;
mod rnbd_registry;
mod rnbd_ring;
mod rnbd_session;
mod rnbd_shared;
mod rnbd_sock;
mod rnbd_stream;
mod rnbd_table;
mod rnbd_traffic;
mod rnbd_translate;

use kapi::{
    disk::Major,
    genl::{Group, Registration},
    hook::Callbacks,
    task, wq,
};
use kernel::{prelude::*, sync::Arc};
use rnbd_dev::Layout;
use rnbd_netlink::Netlink;
use rnbd_registry::Registry;
use rnbd_shared::Shared;

/// `DISK_MAX_PARTS`
const DISK_MAX_PARTS: u64 = 256;

/// Everything that the module holds, in the order in which it goes: first nobody can ask for anything
/// any more, then the devices go, then what they work with.
struct Rnbd {
    _netlink: Registration<Netlink>,
    _devices: AllDevices,
    _slow: wq::Running,
    _callbacks: Callbacks,
    _io: wq::Running,
    _major: Major,
}

/// Removes the devices when it goes.
struct AllDevices(Arc<Registry>);

impl Drop for AllDevices {
    fn drop(&mut self) {
        self.0.clear();
    }
}

impl kernel::Module for Rnbd {
    /// `nbd_init()`
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let layout = layout()?;
        let count = device_count(layout)?;
        let major = Major::register(rnbd_dev::MAJOR, c"nbd").map_err(|e| {
            if e != EBUSY {
                return e;
            }
            pr_err!("cannot have major {}: is nbd.ko loaded?\n", rnbd_dev::MAJOR);
            EIO
        })?;
        let io = wq::Queue::start(c"rnbd", wq::Kind::Reclaim)?;
        let slow = wq::Queue::start(c"rnbd-del", wq::Kind::Plain)?;
        let events = Group::new(rnbd_events::GROUP)?;
        let shared = Shared {
            io: io.queue(),
            slow: slow.queue(),
            events: events.clone(),
        };
        let registry = Registry::new(layout, shared)?;
        let devices = AllDevices(registry.clone());
        let netlink = Netlink {
            registry: registry.clone(),
        };
        let netlink = Registration::new(netlink, events)?;
        for index in 0..count {
            // As nbd.c: the module loads with the devices that could be made. One may be there already:
            // netlink can be used by now.
            if let Err(e) = registry.find_or_add(Some(index), None) {
                pr_err!("cannot make nbd{index} ({e:?})\n");
            }
        }
        Ok(Rnbd {
            _netlink: netlink,
            _devices: devices,
            _slow: slow,
            _callbacks: Callbacks,
            _io: io,
            _major: major,
        })
    }
}

/// How the devices look that the parameters ask for.
fn layout() -> Result<Layout> {
    let max_part = MAX_PART.get();
    if max_part < 0 {
        pr_err!("max_part must be >= 0\n");
        return Err(EINVAL);
    }
    // fls()
    let part_shift = i32::BITS - max_part.leading_zeros();
    MAX_PART.set(((1u64 << part_shift) - 1) as i32);
    if 1u64 << part_shift > DISK_MAX_PARTS {
        return Err(EINVAL);
    }
    let connections = PRE_DEFINED_CONNECTIONS.get();
    if connections < 1 {
        pr_err!("pre_defined_connections must be >= 1\n");
        return Err(EINVAL);
    }
    let stuck_seconds = usize::try_from(REPLACE_STUCK.get()).map_err(|_| {
        pr_err!("replace_stuck must be >= 0\n");
        EINVAL
    })?;
    Ok(Layout {
        part_shift,
        hw_queues: connections as u32,
        stuck_jiffies: stuck_seconds * task::HZ as usize,
    })
}

fn device_count(layout: Layout) -> Result<u32> {
    let count = NBDS_MAX.get() as u32;
    if count > Registry::index_limit(layout) {
        return Err(EINVAL);
    }
    Ok(count)
}

kapi::module_parameter! {
    /// How many devices there are from the start.
    NBDS_MAX = nbds_max: 16, "number of network block devices to initialize (default: 16)";
    /// How many partitions a device can have. What is read is what it was rounded up to.
    MAX_PART = max_part: 16, "number of partitions per device (default: 16)";
    /// How many hardware queues a device is made with.
    PRE_DEFINED_CONNECTIONS = pre_defined_connections: 1,
        "number of connections for devices pre-created at module load (default: 1)";
    /// After how many seconds a connection that owes replies may be replaced.
    REPLACE_STUCK = replace_stuck: 0,
        "seconds after which RECONFIGURE replaces a connection that is silent and owes replies (default: 0, never)";
}

module! {
    type: Rnbd,
    name: "rnbd",
    authors: ["The rnbd authors"],
    description: "Network Block Device",
    license: "GPL",
    alias: ["net-pf-16-proto-16-family-nbd"],
}
