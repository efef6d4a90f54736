// SPDX-License-Identifier: GPL-2.0
//! A request without data has none to be read.

use crate::kapi::{
    mq::{Op, Unsent},
    payload::Payload,
};

fn data(rq: Unsent) -> usize {
    Payload::new(rq, Op::Discard).left_bytes() //~ E0061
    //fix: Payload::new(rq).left_bytes()
}
