// SPDX-License-Identifier: GPL-2.0
//! Wrappers for the block layer: disks, their queues and limits, blk-mq and its requests.
//!
//! Mirrors `kernel::block`, which (7.3) suffices for null_blk only; each file names what is missing
//! there.

mod cache;
pub(crate) mod disk;
mod frozen;
pub(crate) mod gendisk;
pub(crate) mod in_flight;
pub(crate) mod limits;
pub(crate) mod major;
pub(crate) mod mq;
mod outcome;
pub(crate) mod parked;
pub(crate) mod payload;
pub(super) mod pdu;
pub(crate) mod published;
pub(crate) mod request;
pub(crate) mod timed_out;
mod timeline;
