// SPDX-License-Identifier: GPL-2.0
//! What can be replaced while requests are in flight is for dispatches only.

use crate::kapi::block::{
    mq::{Dispatch, Expiry},
    published::Dispatched,
};

fn look(connection: &Dispatched<u32>, expiry: &Expiry<'_>, dispatch: &Dispatch<'_>) -> bool {
    connection.get(expiry).is_some() //~ E0308
    //fix: connection.get(dispatch).is_some()
}
