// SPDX-License-Identifier: GPL-2.0
//! The operations of a queue get the driver part that they are of.

use crate::{
    kapi::block::{
        disk::QueueId,
        gendisk::{BlockDevice, Disk, Numbers},
        limits::FixedLimits,
        mq::TagSet,
    },
    rnbd_dev::Nbd,
};
use kernel::{prelude::*, sync::Arc};

fn add<U: BlockDevice, I: PinInit<Nbd, Error>>(
    tags: (Arc<TagSet<U>>, Arc<TagSet<Nbd>>),
    (limits, numbers): (FixedLimits, Numbers),
    init: impl FnOnce(QueueId) -> I,
) -> Result<Disk<Nbd>> {
    Disk::add(tags.0, limits, numbers, fmt!("nbd"), init) //~ E0308
    //fix: Disk::add(tags.1, limits, numbers, fmt!("nbd"), init)
}
