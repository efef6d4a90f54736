// SPDX-License-Identifier: GPL-2.0
//! A request is started once.

use crate::kapi::block::request::{NewRequest, QueueStatus};

fn start(rq: NewRequest) -> QueueStatus {
    let _handles = rq.start();
    rq.start().2 //~ E0382
    //fix: _handles.2
}
