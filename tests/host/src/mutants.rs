// SPDX-License-Identifier: GPL-2.0
//! The models notice what is wrong: each variant of `rnbd_cmd.rs`, `rnbd_fate.rs` or `kapi/llist.rs` that
//! `build.rs` has spoilt makes the model that it names fail, and for the right reason.

use crate::{
    atomic, llist,
    parts::{commands, fails, fates, lists, parts},
    rnbd_cmd, rnbd_fate,
};

include!(concat!(env!("OUT_DIR"), "/mutants.rs"));
