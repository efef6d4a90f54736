// SPDX-License-Identifier: GPL-2.0
//! As much of `rnbd_events.rs` as is told of an error that a server has returned.

use crate::pure::chunk::Text;

/// Whose events they are.
pub(crate) struct Origin;

pub(crate) struct Incarnation;

pub(crate) struct ServerFailure {
    pub(crate) incarnation: Incarnation,
    pub(crate) error: u32,
    pub(crate) command: u16,
    pub(crate) offset_bytes: u64,
    pub(crate) len_bytes: u32,
    pub(crate) at: Option<u64>,
    pub(crate) text: Text,
}

/// Somebody listens.
pub(crate) struct News;

impl News {
    pub(crate) fn post_server_error(&self, _: &Origin, failure: impl FnOnce() -> ServerFailure) {
        let ServerFailure {
            incarnation: Incarnation,
            error,
            command,
            offset_bytes,
            len_bytes,
            at,
            text,
        } = failure();
        assert!(error != 0 && command != 2, "{error} {command}");
        let is_inside = |at: u64| (offset_bytes..offset_bytes + u64::from(len_bytes)).contains(&at);
        assert!(at.is_none_or(is_inside), "{at:?}");
        // It goes into an attribute that is a string.
        assert!(!text.as_bytes().contains(&0));
    }
}
