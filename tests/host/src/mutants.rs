// SPDX-License-Identifier: GPL-2.0
//! The models notice what is wrong: each variant of `pure/cmd.rs`, `pure/fate.rs` or `kapi/llist.rs` that
//! `build.rs` has spoilt makes the model that it names fail, and for the right reason.

use crate::{
    llist,
    parts::{commands, fails, fates, lists, parts},
    pure::{atomic, cmd, fate},
};

include!(concat!(env!("OUT_DIR"), "/mutants.rs"));
