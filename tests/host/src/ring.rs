// SPDX-License-Identifier: GPL-2.0
//! `pure/ring.rs` does what a `VecDeque` with a bound does.

use crate::pure::ring::Ring;
use proptest::prelude::*;
use std::collections::VecDeque;

proptest! {
    /// `Some` is pushed, `None` pops.
    #[test]
    fn is_a_bounded_queue(
        capacity in 0_usize..6,
        steps in prop::collection::vec(any::<Option<u8>>(), 0..60),
    ) {
        let mut ring = Ring::new(capacity).unwrap();
        let mut known = VecDeque::new();
        for step in steps {
            match step {
                Some(item) if known.len() == capacity => {
                    prop_assert_eq!(ring.push_back(item), Err(item));
                }
                Some(item) => {
                    prop_assert_eq!(ring.push_back(item), Ok(()));
                    known.push_back(item);
                }
                None => prop_assert_eq!(ring.pop_front(), known.pop_front()),
            }
            prop_assert_eq!(ring.len(), known.len());
            prop_assert_eq!(ring.is_empty(), known.is_empty());
            prop_assert_eq!(ring.front_mut(), known.front_mut());
            prop_assert!(ring.iter().eq(&known));
        }
    }
}
