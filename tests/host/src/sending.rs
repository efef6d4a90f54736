// SPDX-License-Identifier: GPL-2.0
//! Who sends what waits: whoever has the lock, for all, or a work item when there is room again. Nothing
//! dies here. The steps are in `connection`.

use crate::{
    connection::{Conditions, Connection, LeftOut, Table},
    parts::{Commands, Module, Parts, explore, models},
};
use loom::thread::{self, JoinHandle};
use std::sync::Arc;

struct Sender<P: Parts> {
    table: Arc<Table<P>>,
    connection: Connection<P>,
}

impl<P: Parts> Sender<P> {
    fn new(left_out: LeftOut, tags: usize, limit: Option<usize>) -> Arc<Self> {
        let table = Table::new(left_out, tags);
        let conditions = Conditions {
            limit,
            ..Conditions::default()
        };
        Arc::new(Sender {
            connection: Connection::new(0, &table, conditions),
            table,
        })
    }

    fn spawn(self: &Arc<Self>, run: impl FnOnce(&Self) + 'static) -> JoinHandle<()> {
        let sender = self.clone();
        thread::spawn(move || run(&sender))
    }

    fn submit(&self, tag: usize) {
        self.push(tag);
        self.connection.kick();
    }

    fn push(&self, tag: usize) {
        let (transmit, other) = self.table.tags[tag].start();
        self.table.slots[tag].start(0, other);
        assert!(self.connection.push(transmit).is_ok());
    }

    /// The connection's work item for sending.
    fn work(self: &Arc<Self>) -> JoinHandle<()> {
        self.spawn(|s| {
            while s.connection.transmit_work.wait_queued() {
                s.connection.transmit_work();
            }
        })
    }

    /// Stops the work item, when nobody else sends any more: all `commands` were sent.
    fn assert_all_sent(&self, worker: JoinHandle<()>, commands: usize) {
        self.connection.transmit_work.stop();
        worker.join().unwrap();
        assert_eq!(self.connection.sent().0, commands, "a command was not sent");
        self.answer();
    }

    /// What was sent is answered.
    fn answer(&self) {
        self.connection.leave();
        self.connection.receive_work();
    }
}

/// Two tasks submit at the same time: both commands are sent, though one task may have done it all.
fn the_last_command_is_sent_without<P: Parts>(left_out: LeftOut) {
    let sender = Sender::<P>::new(left_out, 2, None);
    let other = sender.spawn(|s| s.submit(1));
    sender.submit(0);
    other.join().unwrap();
    assert_eq!(sender.connection.sent().0, 2, "a command was not sent");
    sender.answer();
}

pub(crate) fn the_last_command_is_sent<P: Parts>() {
    the_last_command_is_sent_without::<P>(LeftOut::Nothing);
}

/// The same where one of them leaves the sending to the work item.
fn what_is_left_to_the_work_item_is_sent_without<P: Parts>(left_out: LeftOut) {
    let sender = Sender::<P>::new(left_out, 2, None);
    let worker = sender.work();
    let other = sender.spawn(|s| {
        s.push(1);
        s.connection.queue_transmit();
    });
    sender.submit(0);
    other.join().unwrap();
    sender.assert_all_sent(worker, 2);
}

fn what_is_left_to_the_work_item_is_sent<P: Parts>() {
    what_is_left_to_the_work_item_is_sent_without::<P>(LeftOut::Nothing);
}

/// The user says goodbye while a task submits.
fn the_goodbye_is_sent_without<P: Parts>(left_out: LeftOut) {
    let sender = Sender::<P>::new(left_out, 1, None);
    let user = sender.spawn(|s| s.connection.send_disconnect());
    sender.submit(0);
    user.join().unwrap();
    assert_eq!(sender.connection.sent(), (1, 1), "the goodbye was not sent");
    sender.answer();
}

fn the_goodbye_is_sent<P: Parts>() {
    the_goodbye_is_sent_without::<P>(LeftOut::Nothing);
}

/// The server reacts to the goodbye, and the connection is marked as dead, while the sender has not
/// unlocked yet: nothing is owed, so the server gets no reset.
fn a_goodbye_ends_politely_without<P: Parts>(left_out: LeftOut) {
    let sender = Sender::<P>::new(left_out, 0, None);
    let user = sender.spawn(|s| s.connection.send_disconnect());
    sender.connection.mark_dead();
    user.join().unwrap();
    assert!(!sender.connection.was_reset(), "the server got a reset");
}

/// The user says goodbye, and ends the connection, while a sender that has nothing left to send has not
/// unlocked yet.
fn a_goodbye_is_not_lost_without<P: Parts>(left_out: LeftOut) {
    let sender = Sender::<P>::new(left_out, 0, None);
    let other = sender.spawn(|s| s.connection.kick());
    sender.connection.send_disconnect();
    sender.connection.mark_dead();
    other.join().unwrap();
    assert_eq!(sender.connection.sent(), (0, 1), "the goodbye was not sent");
}

fn a_goodbye_is_not_lost<P: Parts>() {
    a_goodbye_is_not_lost_without::<P>(LeftOut::Nothing);
}

fn a_goodbye_ends_politely<P: Parts>() {
    a_goodbye_ends_politely_without::<P>(LeftOut::Nothing);
}

/// The socket is full, and an acknowledgement makes room, while a command is submitted: it is sent, by
/// whomever, although nothing comes after it.
fn room_is_noticed_without<P: Parts>(left_out: LeftOut) {
    let sender = Sender::<P>::new(left_out, 1, Some(1));
    let worker = sender.work();
    let network = sender.spawn(|s| s.connection.acknowledge());
    sender.submit(0);
    network.join().unwrap();
    sender.assert_all_sent(worker, 1);
}

fn room_is_noticed<P: Parts>() {
    room_is_noticed_without::<P>(LeftOut::Nothing);
}

/// The same with two commands, for which room is made one by one.
fn room_for_two_is_noticed_without<P: Parts>(left_out: LeftOut) {
    let sender = Sender::<P>::new(left_out, 2, Some(2));
    let worker = sender.work();
    let network = sender.spawn(|s| {
        s.connection.acknowledge();
        s.connection.acknowledge();
    });
    sender.push(0);
    sender.submit(1);
    network.join().unwrap();
    sender.assert_all_sent(worker, 2);
}

fn room_for_two_is_noticed<P: Parts>() {
    room_for_two_is_noticed_without::<P>(LeftOut::Nothing);
}

/// The same with one command, and room that is gone again when the sender looks for it.
fn room_that_goes_and_comes_is_noticed_without<P: Parts>(left_out: LeftOut) {
    let sender = Sender::<P>::new(left_out, 1, Some(1));
    let worker = sender.work();
    let network = sender.spawn(|s| {
        s.connection.acknowledge();
        s.connection.shrink();
        s.connection.acknowledge();
    });
    sender.submit(0);
    network.join().unwrap();
    sender.assert_all_sent(worker, 1);
}

fn room_that_goes_and_comes_is_noticed<P: Parts>() {
    room_that_goes_and_comes_is_noticed_without::<P>(LeftOut::Nothing);
}

/// The same with two tasks that submit.
fn room_for_both_is_noticed<P: Parts>() {
    let sender = Sender::<P>::new(LeftOut::Nothing, 2, Some(2));
    let worker = sender.work();
    let network = sender.spawn(|s| {
        s.connection.acknowledge();
        s.connection.acknowledge();
    });
    let other = sender.spawn(|s| s.submit(1));
    sender.submit(0);
    other.join().unwrap();
    network.join().unwrap();
    sender.assert_all_sent(worker, 2);
}

models! {
    the_last_command_is_sent,
    what_is_left_to_the_work_item_is_sent within 4 preemptions,
    the_goodbye_is_sent,
    a_goodbye_ends_politely,
    a_goodbye_is_not_lost,
    room_is_noticed within 4 preemptions,
    room_for_two_is_noticed within 3 preemptions,
    room_that_goes_and_comes_is_noticed within 3 preemptions,
    room_for_both_is_noticed within 2 preemptions,
}

#[test]
#[should_panic(expected = "a command was not sent")]
fn who_sends_must_look_again() {
    explore(
        || the_last_command_is_sent_without::<Module>(LeftOut::LookingAgain),
        None,
    );
}

#[test]
#[should_panic(expected = "a command was not sent")]
fn who_sends_must_look_again_for_the_work_item() {
    explore(
        || what_is_left_to_the_work_item_is_sent_without::<Module>(LeftOut::LookingAgain),
        Some(4),
    );
}

#[test]
#[should_panic(expected = "a command was not sent")]
fn who_looks_again_must_see_what_came_before() {
    explore(
        || the_last_command_is_sent_without::<Module>(LeftOut::BarrierBeforeLookingAgain),
        None,
    );
}

#[test]
#[should_panic(expected = "the goodbye was not sent")]
fn who_says_goodbye_must_be_seen() {
    explore(
        || the_goodbye_is_sent_without::<Module>(LeftOut::BarrierAfterGoodbye),
        None,
    );
}

#[test]
#[should_panic(expected = "the server got a reset")]
fn who_ends_a_socket_must_wait_for_the_sender() {
    explore(
        || a_goodbye_ends_politely_without::<Module>(LeftOut::WaitingForSender),
        None,
    );
}

#[test]
#[should_panic(expected = "the goodbye was not sent")]
fn who_says_goodbye_must_wait_for_its_turn() {
    explore(
        || a_goodbye_is_not_lost_without::<Module>(LeftOut::WaitingForTurn),
        None,
    );
}

#[test]
#[should_panic(expected = "a command was not sent")]
fn who_waits_for_room_must_ask_for_a_report() {
    explore(
        || room_that_goes_and_comes_is_noticed_without::<Module>(LeftOut::AskingForRoom),
        Some(3),
    );
}

#[test]
#[should_panic(expected = "a command was not sent")]
fn who_tells_of_room_must_not_undo_a_later_wait() {
    explore(
        || room_for_two_is_noticed_without::<Module>(LeftOut::ForgettingReportFirst),
        Some(3),
    );
}

#[test]
#[should_panic(expected = "a command was not sent")]
fn who_takes_its_turn_must_have_the_lock() {
    explore(
        || room_for_two_is_noticed_without::<Module>(LeftOut::LockingBeforeTurns),
        Some(3),
    );
}

#[test]
#[should_panic(expected = "a command was not sent")]
fn who_waits_for_room_must_look_for_it() {
    explore(
        || room_is_noticed_without::<Module>(LeftOut::LookingForRoom),
        None,
    );
}

#[test]
#[should_panic(expected = "a command was not sent")]
fn who_waits_for_room_must_say_so_first() {
    explore(
        || room_is_noticed_without::<Module>(LeftOut::WaitingBeforeLooking),
        None,
    );
}

#[test]
#[should_panic(expected = "a command was not sent")]
fn who_looks_for_room_must_have_said_that_it_waits() {
    explore(
        || room_is_noticed_without::<Module>(LeftOut::BarrierBeforeLookingForRoom),
        None,
    );
}

#[test]
#[should_panic(expected = "a command was not sent")]
fn who_tells_of_room_must_have_made_it() {
    explore(
        || room_is_noticed_without::<Module>(LeftOut::BarrierAfterRoom),
        None,
    );
}
