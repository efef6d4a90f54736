// SPDX-License-Identifier: GPL-2.0
//! The block layer: disks, queues, requests.

pub(crate) mod disk;
mod frozen;
pub(crate) mod gendisk;
pub(crate) mod limits;
pub(crate) mod mq;
pub(crate) mod payload;
pub(crate) mod published;
pub(crate) mod request;
