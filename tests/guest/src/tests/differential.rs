// SPDX-License-Identifier: GPL-2.0

//! Sequences of operations that nobody has thought of, on nbd.ko and on the driver under test. The
//! differential test itself is in `differential/`.

use crate::debug_kernel::{self, enough};
use crate::differential::{Op, Plan, Report, Request, Side, Step, compare, fresh_seed};
use crate::driver::Driver;
use crate::harness::{Guest, Test};
use crate::test;

pub fn tests() -> Vec<Test> {
    vec![
        test!(nothing_differs_from_itself)
            .unloaded()
            .limit_seconds(300),
        test!(what_differs_is_found).unloaded().limit_seconds(300),
        test!(of_a_fixed_seed).unloaded().limit_seconds(1500),
        test!(of_a_fresh_seed).unloaded().limit_seconds(300),
    ]
}

const FIXED_SEED: u64 = 1;

/// Which driver says what is right: nbd.ko. On the debug kernel its receiving makes lockdep report a
/// cycle of locks, after which that looks for nothing more, so that there the sequences only show what
/// the kernel says of the driver under test.
fn oracle(guest: &Guest) -> Driver {
    if debug_kernel::runs() {
        guest.driver
    } else {
        Driver::Nbd
    }
}

fn run(sides: [Side; 2], seed: u64, count: u64) -> Report {
    let plan = Plan {
        sides,
        seed,
        first: 0,
        count,
        shrink: true,
    };
    compare(&plan).unwrap_or_else(|failure| panic!("seed {seed}: {failure}"))
}

fn assert_same(sides: [Side; 2], seed: u64, count: u64) {
    let report = run(sides, seed, count);
    println!("seed {seed}: {report}");
    assert!(report.differences.is_empty(), "seed {seed}: {report}");
}

fn nothing_differs_from_itself(guest: &Guest) {
    let sides = [oracle(guest).into(), oracle(guest).into()];
    assert_same(sides, FIXED_SEED, enough(8, 3));
}

/// A driver that takes every block size but one.
fn what_differs_is_found(guest: &Guest) {
    let refuse = |op: &Op, step: &mut Step| {
        let Op::Ioctl { request, .. } = op else {
            return;
        };
        let taken = step.iter_mut().find(|(_, value)| value == "Ok(0)");
        if let (Request::SetBlksize(4096), Some((_, value))) = (request, taken) {
            *value = "refused".into();
        }
    };
    let wrong = Side {
        driver: guest.driver,
        plant: Some(refuse),
    };
    let report = run([guest.driver.into(), wrong], FIXED_SEED, 12);
    let found = report.differences.first().expect("a difference");
    assert!(
        matches!(
            found.sequence[..],
            [
                Op::Open { .. },
                Op::Ioctl {
                    request: Request::SetBlksize(4096),
                    ..
                }
            ]
        ),
        "{}",
        found.text
    );
}

fn of_a_fixed_seed(guest: &Guest) {
    let sides = [oracle(guest).into(), guest.driver.into()];
    assert_same(sides, FIXED_SEED, enough(200, 20));
}

fn of_a_fresh_seed(guest: &Guest) {
    let sides = [oracle(guest).into(), guest.driver.into()];
    assert_same(sides, fresh_seed(), enough(20, 10));
}
