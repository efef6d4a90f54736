// SPDX-License-Identifier: GPL-2.0
//! Unsafe code belongs into kapi/.

#![forbid(unsafe_code)]

#[allow(unsafe_code)] //~ E0453
//fix:
fn zero() -> u8 {
    0
}
