// SPDX-License-Identifier: GPL-2.0
//! What came in is read in the callback that told of it.

use crate::kapi::net::arrival::Arrival;

struct Kept(Option<Arrival<'static>>);

fn tcp_data_ready(kept: &mut Kept, arrival: Arrival<'_>) {
    kept.0 = Some(arrival); //~ lifetime may not live long enough
    //fix: arrival.read(|_| false);
}
