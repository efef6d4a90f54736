// SPDX-License-Identifier: GPL-2.0
//! What libFuzzer calls.
#![no_main]

libfuzzer_sys::fuzz_target!(|script: &[u8]| rnbd_fuzz::run(script));
