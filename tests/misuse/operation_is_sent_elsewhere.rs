// SPDX-License-Identifier: GPL-2.0
//! Another task is in no operation.

use crate::kapi::block::mq::Dispatch;

fn elsewhere(_what: impl Send) {}

fn send(cx: &Dispatch<'_>) {
    elsewhere(cx); //~ E0277
    //fix: elsewhere(cx.hw_queue());
}
