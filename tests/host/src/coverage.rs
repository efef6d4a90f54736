// SPDX-License-Identifier: GPL-2.0
//! What of a read was answered, against a map of its bytes; and what is kept of it from one chunk to the next.

use crate::blk_mq::{Parked, Tag, Verdict};
use crate::{
    parts::explore,
    pure::cmd::Slot,
    pure::coverage::{Answer, Coverage, Progress, Refusal},
};
use loom::thread;
use proptest::prelude::*;
use std::sync::Arc;

/// The bytes of a short read.
const LEN: usize = 24;

fn ranges(map: &[bool]) -> usize {
    let before = [false].iter().chain(map);
    before.zip(map).filter(|(a, b)| !**a && **b).count()
}

proptest! {
    #[test]
    fn is_that_of_a_map(parts in prop::collection::vec((0..LEN, 1..8_usize), 1..20)) {
        let mut coverage = Coverage::NONE;
        let mut map = [false; LEN];
        for (start, len) in parts {
            let end = (start + len).min(LEN);
            let mut next = map;
            next[start..end].fill(true);
            let expected = if map[start..end].contains(&true) {
                Err(Refusal::Overlap)
            } else if ranges(&next) > 4 {
                Err(Refusal::TooManyRanges)
            } else {
                map = next;
                Ok(())
            };
            prop_assert_eq!(coverage.add(start as u32, end as u32), expected);
            let leading = map.iter().take_while(|got| **got).count();
            prop_assert_eq!(coverage.leading_bytes() as usize, leading);
        }
    }
}

#[test]
fn an_error_says_what_is_good() {
    let mut answer = Answer::NONE;
    answer.add(0, 4096).unwrap();
    answer.fail(5, Some(1024));
    assert_eq!((answer.error, answer.good_bytes()), (5, 1024));
    // The first error counts, and the least offset.
    answer.fail(28, Some(512));
    assert_eq!((answer.error, answer.good_bytes()), (5, 512));
    // Without an offset, nothing is good.
    answer.fail(28, None);
    assert_eq!((answer.error, answer.good_bytes()), (5, 0));
    // More ranges than are remembered are taken, and what is answered twice is not.
    for at in 3..8 {
        assert_eq!(answer.add(at * 4096, at * 4096 + 512), Ok(()));
    }
    assert_eq!(answer.add(1024, 2048), Err(Refusal::Overlap));
}

/// What is kept is that of one command, until that has ended.
#[test]
fn each_command_begins_with_nothing() {
    loom::model(|| {
        let kept = Progress::new();
        assert_eq!(kept.of(0), Answer::NONE);
        let mut answer = Answer::NONE;
        answer.add(512, 1024).unwrap();
        kept.keep(7, &answer);
        kept.hear(1234);
        assert_eq!((kept.of(7), kept.heard_at(7)), (answer, Some(1234)));
        assert_eq!((kept.of(8), kept.heard_at(8)), (Answer::NONE, None));
        answer.fail(5, None);
        kept.keep(7, &answer);
        assert_eq!(kept.of(7), answer);
        kept.clear();
        assert_eq!((kept.of(7), kept.heard_at(7)), (Answer::NONE, None));
    });
}

/// The chunks of a reply are received by the socket's callback and by a work item. Each finds what the other has kept, if
/// it gets the claim, and the command ends when both have come.
#[test]
fn what_is_kept_goes_with_the_claim() {
    fn receive(slot: &Slot<Parked>, kept: &Progress, start: u32) -> bool {
        let Ok(request) = slot.claim(1, 0) else {
            return false;
        };
        request.0.write_pages();
        let mut answer = kept.of(1);
        answer
            .add(start, start + 512)
            .expect("nobody else has this part");
        if answer.coverage.leading_bytes() == 1024 {
            kept.clear();
            request.finish(Verdict::Complete);
        } else {
            kept.keep(1, &answer);
            slot.unclaim(request);
        }
        true
    }
    fn model() {
        let tag = Tag::new();
        let both = Arc::new((Slot::new(Parked::empty()), Progress::new()));
        let (transmit, other) = tag.start();
        assert_eq!(both.0.start(0, other), 1);
        drop(transmit);
        let callback = thread::spawn({
            let both = both.clone();
            move || receive(&both.0, &both.1, 0)
        });
        // The handler of timeouts looks at any time.
        let timeout = thread::spawn({
            let both = both.clone();
            move || both.1.heard_at(1)
        });
        let work = receive(&both.0, &both.1, 512);
        let callback = callback.join().unwrap();
        timeout.join().unwrap();
        assert!(work || callback, "nobody has got the claim");
        if work && callback {
            assert_eq!(tag.history(), [Verdict::Complete]);
        } else {
            // Whoever has lost the claim has seen a violation: the receive lock keeps that from happening.
            both.0.reclaim(0).expect("lost").finish(Verdict::Requeue);
        }
    }
    explore(model, Some(2));
}
