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
mod rnbd_dev;
mod rnbd_ioctl;
mod rnbd_proto;
mod rnbd_ring;
mod rnbd_session;
mod rnbd_sock;
mod rnbd_table;

use kapi::{
    disk::{Disk, Major},
    wq::ModuleQueue,
};
use kernel::prelude::*;
use rnbd_dev::{Device, Layout};

/// `MINORBITS`
const MINOR_BITS: u32 = 20;
/// `DISK_MAX_PARTS`
const DISK_MAX_PARTS: u64 = 256;

/// Everything that the module holds, in the order in which it goes.
struct Rnbd {
    _devices: KVec<Disk<Device>>,
    _queue: ModuleQueue,
    _major: Major,
}

impl kernel::Module for Rnbd {
    /// `nbd_init()`
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let layout = layout()?;
        let count = device_count(layout)?;
        let major = Major::register(rnbd_dev::MAJOR, c"nbd").map_err(|_| {
            pr_err!("cannot have major {}: is nbd.ko loaded?\n", rnbd_dev::MAJOR);
            EIO
        })?;
        let queue = ModuleQueue::new(c"rnbd")?;
        let mut devices = KVec::with_capacity(count as usize, GFP_KERNEL)?;
        for index in 0..count {
            // As nbd.c: the module loads with the devices that could be made.
            match rnbd_dev::add(index, layout) {
                Ok(device) => devices.push(device, GFP_KERNEL)?,
                Err(e) => pr_err!("cannot make nbd{index} ({e:?})\n"),
            }
        }
        Ok(Rnbd {
            _devices: devices,
            _queue: queue,
            _major: major,
        })
    }
}

/// How the devices look that the parameters ask for.
fn layout() -> Result<Layout> {
    let max_part = module_parameters::max_part.value();
    if max_part < 0 {
        pr_err!("max_part must be >= 0\n");
        return Err(EINVAL);
    }
    // fls()
    let part_shift = i32::BITS - max_part.leading_zeros();
    if 1u64 << part_shift > DISK_MAX_PARTS {
        return Err(EINVAL);
    }
    let connections = module_parameters::pre_defined_connections.value();
    if connections < 1 {
        pr_err!("pre_defined_connections must be >= 1\n");
        return Err(EINVAL);
    }
    Ok(Layout {
        part_shift,
        hw_queues: connections as u32,
    })
}

fn device_count(layout: Layout) -> Result<u32> {
    let count = module_parameters::nbds_max.value() as u32;
    if count > 1 << (MINOR_BITS - layout.part_shift) {
        return Err(EINVAL);
    }
    Ok(count)
}

module! {
    type: Rnbd,
    name: "rnbd",
    authors: ["The rnbd authors"],
    description: "Network Block Device",
    license: "GPL",
    params: {
        nbds_max: i32 {
            default: 16,
            description: "number of network block devices to initialize (default: 16)",
        },
        max_part: i32 {
            default: 16,
            description: "number of partitions per device (default: 16)",
        },
        pre_defined_connections: i32 {
            default: 1,
            description: "number of connections for devices pre-created at module load (default: 1)",
        },
    },
}
