// SPDX-License-Identifier: GPL-2.0
//! The models notice what is wrong: each variant of `rnbd_cmd.rs` that `build.rs` has spoilt makes
//! the model that it names fail, and for the right reason.

use crate::{
    atomic,
    ownership::{self, commands, explore},
    session,
};

/// A test that passes when `model` fails on `module` with `complaint`.
macro_rules! mutant {
    ($module:ident, $($model:ident)::+, $complaint:literal) => {
        commands!($module);

        #[test]
        #[should_panic(expected = $complaint)]
        fn $module() {
            explore($($model)::+::<$module::Slot<crate::blk_mq::Parked>>, None);
        }
    };
}

include!(concat!(env!("OUT_DIR"), "/mutants.rs"));
