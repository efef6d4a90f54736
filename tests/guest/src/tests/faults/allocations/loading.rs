// SPDX-License-Identifier: GPL-2.0

//! Loading and unloading the module.

use super::of_driver;
use crate::device::{SOON, assert_usable};
use crate::driver::{Driver, devices};
use crate::harness::{Guest, Test, say, wait_until};
use crate::injection::{self, Allocations, Knobs, sample, sweep};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(of_loading).unloaded().limit_seconds(300),
        test!(of_unloading).unloaded().limit_seconds(200),
    ]
}

fn of_loading(guest: &Guest) {
    let _allocations = Allocations::of(&injection::code_of_initialisation());
    let unload = || {
        guest.driver.unload().expect("to unload");
    };
    let whole = sweep("loading", |nth| {
        if nth.fail(|| guest.driver.load("nbds_max=0")).is_ok() {
            unload();
        }
        assert!(!guest.driver.loaded());
    });
    assert!(whole.failed > 10);
    // Devices are made as `of_connect_of_a_new_device` has each step of it fail.
    let mut missing = 0;
    let some = sample("loading, with a device", 8, |nth| {
        if nth.fail(|| guest.driver.load("nbds_max=1")).is_ok() {
            // As nbd.ko does it: the module is there with what devices could be made.
            missing += u32::from(devices().is_empty());
            unload();
        }
        assert!(!guest.driver.loaded() && devices().is_empty());
    });
    say(&format!("{missing} times it was loaded without the device"));
    assert!(missing > 0);
    if guest.expected("loading-returns-enomem") == Driver::Rnbd {
        whole.assert_only_enomem();
        some.assert_only_enomem();
    }
    guest.driver.load("nbds_max=1").expect("to load");
    assert_usable(0);
}

fn of_unloading(guest: &Guest) {
    // The driver's place is not known before it is loaded; whether the kernel can do this is.
    drop(Knobs::of("failslab"));
    let swept = sweep("unloading", |nth| {
        guest.driver.load("nbds_max=1").expect("to load");
        let _allocations = of_driver(guest);
        // Who closed the device may not be gone yet.
        let free = wait_until(SOON, || guest.driver.references() == 0);
        assert!(free.is_ok());
        let unloaded = nth.fail(|| guest.driver.try_unload());
        assert_eq!(unloaded, Ok(()));
    });
    assert!(swept.failed > 0);
}
