// SPDX-License-Identifier: GPL-2.0
//! Errors that `kernel::error::code` has in 7.3, but not in 7.2. They are converted to an
//! [`Error`] with `into()` or `?`, and compared to one as those of the crate are.

use super::bindings;
use kernel::error::Error;

/// An error number, without the sign that it has as an [`Error`].
#[derive(Clone, Copy)]
pub(crate) struct Errno(u32);

impl From<Errno> for Error {
    fn from(errno: Errno) -> Error {
        Error::from_errno(-(errno.0 as i32))
    }
}

impl PartialEq<Errno> for Error {
    fn eq(&self, other: &Errno) -> bool {
        *self == Error::from(*other)
    }
}

/// No data available.
pub(crate) const ENODATA: Errno = Errno(bindings::ENODATA);
/// Protocol error.
pub(crate) const EPROTO: Errno = Errno(bindings::EPROTO);
/// Operation not supported on transport endpoint.
pub(crate) const EOPNOTSUPP: Errno = Errno(bindings::EOPNOTSUPP);
/// No buffer space available.
pub(crate) const ENOBUFS: Errno = Errno(bindings::ENOBUFS);
/// Socket operation on non-socket.
pub(crate) const ENOTSOCK: Errno = Errno(bindings::ENOTSOCK);
/// Transport endpoint is not connected.
pub(crate) const ENOTCONN: Errno = Errno(bindings::ENOTCONN);
/// Key has expired: TLS cannot decrypt what follows.
pub(crate) const EKEYEXPIRED: Errno = Errno(bindings::EKEYEXPIRED);
/// Required key not available.
pub(crate) const ENOKEY: Errno = Errno(bindings::ENOKEY);
/// Remote I/O error.
pub(crate) const EREMOTEIO: Errno = Errno(bindings::EREMOTEIO);
