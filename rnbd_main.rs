// SPDX-License-Identifier: GPL-2.0
//! A network block device client that is loaded in place of `nbd.ko`.
//!
//! This file is the crate root: it registers everything when the module is loaded, and unregisters
//! it in reverse order. `Documentation/design.rst` describes how the parts fit together.

#![deny(unsafe_code)]

// This comes first because it defines a macro that `kapi` uses.
#[macro_use]
mod rnbd_params;

#[allow(unsafe_code)]
mod kapi;
mod pure;
mod rnbd_dev;
mod rnbd_events;
mod rnbd_ioctl;
mod rnbd_netlink;
mod rnbd_ratelimit;
mod rnbd_registry;
mod rnbd_session;
mod rnbd_shared;
mod rnbd_sock;
mod rnbd_table;
mod rnbd_translate;

use kapi::{
    block::major::Major,
    net::{
        genl::Registration,
        group::Group,
        hook::Hooks,
        port::Notifier, //
    },
    wq, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};
use rnbd_events::EventQueue;
use rnbd_netlink::{
    events,
    listing::Listing,
    Netlink, //
};
use rnbd_registry::{
    Owners,
    Registry, //
};
use rnbd_shared::Shared;

/// Everything that the module holds, in the order in which it is dropped.
///
/// The netlink families are unregistered first, so that no new requests from user space arrive, and then
/// the notifier. Then the devices are removed, and then the resources that they use are released.
struct Rnbd {
    _listing: Registration<Listing>,
    _netlink: Registration<Netlink>,
    _owners: Notifier<Owners>,
    _devices: AllDevices,
    _scan: wq::OwnedQueue,
    _slow: wq::OwnedQueue,
    _hooks: Hooks,
    _io: wq::OwnedQueue,
    _major: Major,
}

/// Removes all devices when it is dropped.
struct AllDevices(Arc<Registry>);

impl Drop for AllDevices {
    fn drop(&mut self) {
        self.0.clear();
    }
}

impl kernel::Module for Rnbd {
    /// Registers everything (`nbd_init()`).
    ///
    /// # Errors
    ///
    /// - `EINVAL`: a module parameter is out of range.
    /// - `EIO`: the major number is in use, most likely by nbd.ko.
    /// - `EEXIST`: another generic netlink family has the name "nbd".
    /// - `ENOMEM`.
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let layout = rnbd_params::layout()?;
        let count = rnbd_params::device_count(layout)?;
        let major = Major::register(rnbd_dev::MAJOR, c"nbd").map_err(|e| {
            if e != EBUSY {
                return e;
            }
            pr_err!(
                "cannot register major {}: is nbd.ko loaded?\n",
                rnbd_dev::MAJOR
            );
            EIO
        })?;
        let io = wq::OwnedQueue::new(c"rnbd", wq::Kind::Reclaim)?;
        let hooks = Hooks::begin()?;
        let slow = wq::OwnedQueue::new(c"rnbd-slow", wq::Kind::Plain)?;
        let scan = wq::OwnedQueue::new(c"rnbd-scan", wq::Kind::Plain)?;
        let group = Group::new(events::GROUP)?;
        let listeners = Group::new(events::LISTENERS)?;
        let told = Arc::new(events::Told(listeners.clone()), GFP_KERNEL)?;
        let shared = Shared {
            io: io.queue(),
            slow: slow.queue(),
            scan: scan.queue(),
            events: Arc::new(events::Multicast(group.clone()), GFP_KERNEL)?,
            news: EventQueue::new(told, slow.queue())?,
        };
        let registry = Registry::new(layout, shared)?;
        let devices = AllDevices(registry.clone());
        let owners = Notifier::register(Owners(registry.clone()))?;
        let netlink = Netlink {
            registry: registry.clone(),
        };
        let netlink = Registration::new(netlink, Some(group))?;
        let listing = Listing {
            registry: registry.clone(),
        };
        // Nothing after this may fail: a user may have begun a list.
        let listing = Registration::new(listing, Some(listeners))?;
        for index in 0..count {
            // As in nbd.c, the module is loaded even if some of the devices could not be added. A
            // device may exist already, because user space can use the netlink family by now.
            if let Err(e) = registry.find_or_add(Some(index), None) {
                pr_err!("cannot add nbd{index} ({e:?})\n");
            }
        }
        Ok(Rnbd {
            _listing: listing,
            _netlink: netlink,
            _owners: owners,
            _devices: devices,
            _scan: scan,
            _slow: slow,
            _hooks: hooks,
            _io: io,
            _major: major,
        })
    }
}

module! {
    type: Rnbd,
    name: "rnbd",
    authors: ["The rnbd authors"],
    description: "NBD client, in place of nbd.ko (not RNBD, the RDMA network block device)",
    license: "GPL",
    alias: ["net-pf-16-proto-16-family-nbd"],
}
