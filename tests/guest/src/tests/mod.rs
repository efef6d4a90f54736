// SPDX-License-Identifier: GPL-2.0

//! The tests, in the order in which they run: from the module's life to long ones.

mod block_sizes;
mod completions;
mod connecting;
mod differential;
mod do_it;
mod endings;
mod errors;
mod events;
mod faults;
mod fsx;
mod geometry;
mod handover;
mod hostile;
mod hostile_user;
mod integrity;
mod io;
mod ioctl;
mod journals;
mod keep;
mod late_writes;
mod leftovers;
mod limits;
mod listing;
mod long;
mod module;
mod multi;
mod netlink;
mod network;
mod outages;
mod partitions;
mod races;
mod replies;
mod restart;
mod rnbdctl;
mod shared_sockets;
mod shutdowns;
mod signals;
mod soak;
mod stacks;
mod structured;
mod timeouts;
mod tls;
mod tls_records;
mod trace;
mod transports;
mod udev;
mod user_space;

use crate::harness::Test;

pub fn all() -> Vec<Test> {
    [
        module::tests(),
        ioctl::tests(),
        do_it::tests(),
        geometry::tests(),
        block_sizes::tests(),
        limits::tests(),
        leftovers::tests(),
        io::tests(),
        completions::tests(),
        multi::tests(),
        errors::tests(),
        replies::tests(),
        structured::tests(),
        hostile::tests(),
        hostile_user::tests(),
        timeouts::tests(),
        endings::tests(),
        late_writes::tests(),
        signals::tests(),
        tls::tests(),
        tls_records::tests(),
        transports::tests(),
        shared_sockets::tests(),
        netlink::tests(),
        listing::tests(),
        events::tests(),
        handover::tests(),
        connecting::tests(),
        shutdowns::tests(),
        races::tests(),
        trace::tests(),
        faults::tests(),
        udev::tests(),
        user_space::tests(),
        rnbdctl::tests(),
        keep::tests(),
        differential::tests(),
        fsx::tests(),
        outages::tests(),
        partitions::tests(),
        restart::tests(),
        integrity::tests(),
        journals::tests(),
        network::tests(),
        long::tests(),
        stacks::tests(),
        soak::tests(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
