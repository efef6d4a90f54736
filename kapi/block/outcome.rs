// SPDX-License-Identifier: GPL-2.0
//! How a request ends: its status, and what is good of it.
//!
//! C header: [`include/linux/blk_types.h`](srctree/include/linux/blk_types.h)

use crate::kapi::bindings;

/// A status of the block layer (`blk_status_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Status(pub(super) u8);

impl Status {
    pub(crate) const OK: Status = Status(bindings::BLK_STS_OK as u8);
    /// The operation is not supported (`EOPNOTSUPP`).
    pub(crate) const NOTSUPP: Status = Status(bindings::BLK_STS_NOTSUPP);
    /// There is no space left (`ENOSPC`).
    pub(crate) const NOSPC: Status = Status(bindings::BLK_STS_NOSPC);
    /// The target failed the request (`EREMOTEIO`).
    pub(crate) const TARGET: Status = Status(bindings::BLK_STS_TARGET);
    /// An I/O error (`EIO`).
    pub(crate) const IOERR: Status = Status(bindings::BLK_STS_IOERR);
    /// The request cannot be started yet. This does not end it: the block layer keeps it until the
    /// queue runs again, which the driver must ensure
    /// ([`Dispatch::run_again()`](super::mq::Dispatch::run_again)).
    pub(crate) const DEV_RESOURCE: Status = Status(bindings::BLK_STS_DEV_RESOURCE);
}

/// How a request ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The request is completed with this status.
    Complete(Status),
    /// The request is completed with this status, but so many sectors from its start are good. It must have more
    /// sectors than that.
    Partly(Status, u32),
    /// The request is requeued, and the block layer dispatches it again.
    Requeue,
}

impl Outcome {
    /// The request is completed without an error.
    pub(crate) const SUCCESS: Outcome = Outcome::Complete(Status::OK);

    /// Converts the outcome to the form in which a request stores it: a `blk_status_t` and the number of good sectors
    /// above it, or [`REQUEUE`].
    pub(super) fn pack(self) -> u32 {
        match self {
            Outcome::Complete(status) => u32::from(status.0),
            Outcome::Partly(status, sectors) => {
                u32::from(status.0) | sectors.min(u32::MAX >> GOOD_SHIFT) << GOOD_SHIFT
            }
            Outcome::Requeue => REQUEUE,
        }
    }
}

/// [`Outcome::Requeue`] in packed form. It is larger than any `blk_status_t`.
pub(super) const REQUEUE: u32 = 1 << 8;
/// The position of the number of good sectors in a packed outcome. The bits below it, and above [`REQUEUE`], are
/// for what else is stored in the same word (`pdu.rs`).
const GOOD_SHIFT: u32 = 11;

/// Returns the number of good sectors of a packed outcome that is not [`REQUEUE`].
pub(super) fn good_sectors(packed: u32) -> u32 {
    packed >> GOOD_SHIFT
}
