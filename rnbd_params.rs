// SPDX-License-Identifier: GPL-2.0
//! The module parameters.

#![forbid(unsafe_code)]

use crate::{
    kapi::{
        param::{
            DEAD_CONN_TIMEOUT,
            MAX_PART,
            NBDS_MAX,
            PARTITION_SCAN,
            PRE_DEFINED_CONNECTIONS,
            REPLACE_STUCK, //
        },
        task, //
    },
    rnbd_dev::Layout,
    rnbd_registry::Registry, //
};
use kernel::prelude::*;

/// See `DISK_MAX_PARTS`.
const DISK_MAX_PARTS: u64 = 256;

/// Lists the parameters for `kapi/param.rs`, which defines them.
macro_rules! parameters {
    ($define:ident) => {
        $define! {
            /// The number of devices that are added when the module is loaded.
            NBDS_MAX = nbds_max: 16, "number of network block devices to initialize (default: 16)";
            /// The maximum number of partitions of a device. Reading it returns the value after
            /// rounding up.
            MAX_PART = max_part: 16, "number of partitions per device (default: 16)";
            /// The number of hardware queues that a device is created with.
            PRE_DEFINED_CONNECTIONS = pre_defined_connections: 1,
                "number of connections for devices pre-created at module load (default: 1)";
            /// The time in seconds after which a silent connection that owes replies may be
            /// replaced.
            REPLACE_STUCK = replace_stuck: 0,
                "seconds after which RECONFIGURE replaces a connection that is silent and owes replies (default: 0, never)";
            /// The time in seconds for which requests of a device that was configured by ioctl wait
            /// for a new connection. It is what `NBD_ATTR_DEAD_CONN_TIMEOUT` is for netlink.
            DEAD_CONN_TIMEOUT = dead_conn_timeout: 0,
                "seconds for which I/O waits for a new connection if the device was set up by ioctl (default: 0)";
            /// Whether partitions are looked for when a device has started.
            PARTITION_SCAN = partition_scan: 1,
                "look for partitions when a device is connected (default: 1; 0: only when user space asks for it)";
        }
    };
}

/// Returns the layout of the devices that the parameters ask for.
///
/// # Errors
///
/// `EINVAL`: a parameter is out of range.
pub(crate) fn layout() -> Result<Layout> {
    let max_part = MAX_PART.get();
    if max_part < 0 {
        pr_err!("max_part must be >= 0\n");
        return Err(EINVAL);
    }
    // This is `fls()`.
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
    let dead_seconds = u64::try_from(DEAD_CONN_TIMEOUT.get()).map_err(|_| {
        pr_err!("dead_conn_timeout must be >= 0\n");
        EINVAL
    })?;
    Ok(Layout {
        part_shift,
        hw_queues: connections as u32,
        stuck_jiffies: stuck_seconds * task::HZ as usize,
        scan_partitions: PARTITION_SCAN.get() != 0,
        dead_timeout_jiffies: dead_seconds * u64::from(task::HZ),
    })
}

/// Returns the number of devices that are added when the module is loaded.
///
/// # Errors
///
/// `EINVAL`: there are not as many minor numbers.
pub(crate) fn device_count(layout: Layout) -> Result<u32> {
    let count = NBDS_MAX.get() as u32;
    if count > Registry::index_limit(layout) {
        return Err(EINVAL);
    }
    Ok(count)
}
