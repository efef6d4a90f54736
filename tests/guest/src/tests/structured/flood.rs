// SPDX-License-Identifier: GPL-2.0

//! Servers that mix right chunks with lies about them, in thousands of replies.

use super::super::hostile::{FEW_DEVICES, HOURS, SHORT, Session, many, torment};
use crate::harness::{Guest, Test};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(by_either_front_end).parameters(FEW_DEVICES),
        test!(a_hundred_thousand_streams)
            .parameters("nbds_max=8")
            .limit_seconds(5400)
            .on_request(),
    ]
}

fn by_either_front_end(_: &Guest) {
    torment(2000, SHORT / 3, |random| match random.u8(..4) {
        0 => Session::by_ioctls(random.usize(1..=2)).structured(),
        _ => Session::by_netlink(random.usize(1..=4)).structured(),
    });
}

/// `REPLIES` in the environment: how many really.
fn a_hundred_thousand_streams(_: &Guest) {
    torment(many(), HOURS, |random| match random.u8(..8) {
        0 => Session::by_ioctls(1).structured(),
        1 => Session::by_ioctls(random.usize(2..=4)).structured(),
        _ => Session::by_netlink(random.usize(1..=4)).structured(),
    });
}
