// SPDX-License-Identifier: GPL-2.0

//! Hears the events of a device.

use std::thread;
use std::time::Duration;

use crate::device::SOON;
use crate::driver::Driver;
use crate::harness::{Guest, skip, wait_until};
use crate::netlink::{Attr, Netlink, number};

/// Events.
pub const CONNECTED: u8 = 3;
pub const CONNECTION_DEAD: u8 = 4;
pub const RECONNECTED: u8 = 5;
pub const DISCONNECTED: u8 = 6;
pub const RESIZED: u8 = 7;

/// Attributes of an event.
pub const DEVICE: u16 = 1;
pub const CONNECTION: u16 = 2;
pub const REASON: u16 = 3;
pub const ERRNO: u16 = 4;
pub const RECONNECTS: u16 = 5;
pub const BACKEND: u16 = 6;
pub const SIZE: u16 = 7;
pub const BLOCK_SIZE: u16 = 8;
pub const FLAGS: u16 = 9;
pub const CONNECTIONS: u16 = 10;
pub const INTERFACE: u16 = 11;
pub const PID: u16 = 12;

/// Why a connection has died.
pub const CLOSED: u32 = 0;
pub const RECEIVE_FAILED: u32 = 1;
pub const SEND_FAILED: u32 = 2;
pub const PROTOCOL_VIOLATED: u32 = 3;
pub const TIMED_OUT: u32 = 4;
pub const SHUTTING_DOWN: u32 = 5;
pub const REPLACED: u32 = 6;
pub const WANTS_REKEYING: u32 = 8;

/// An event, as far as most tests look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    Connected,
    /// The connection, how often there was another one at its place, and why.
    Dead(u32, u32, u32),
    Reconnected(u32, u32),
    Disconnected,
    Resized(u64),
}

/// What somebody hears of one device.
pub struct Listener {
    pub netlink: Netlink,
    device: u32,
}

impl Listener {
    /// Hears of device `device` from now on.
    pub fn new(guest: &Guest, device: u32) -> Self {
        if guest.driver == Driver::Nbd {
            skip("the family is rnbd's");
        }
        Self::here(device)
    }

    /// Does the same where the driver is known to be rnbd. The network namespace is that of the task.
    pub fn here(device: u32) -> Self {
        Self {
            netlink: Netlink::listen_to("rnbd"),
            device,
        }
    }

    fn next_attributes(&self) -> (u8, Vec<Attr>) {
        let mut event = None;
        let heard = wait_until(SOON, || {
            event = self.netlink.told().expect("an event");
            event.is_some()
        });
        assert!(heard.is_ok(), "nothing is heard");
        event.unwrap()
    }

    /// The attributes of the next event, which is to be `command`.
    pub fn expect(&self, command: u8) -> Vec<Attr> {
        let (heard, attrs) = self.next_attributes();
        assert_eq!(heard, command, "{attrs:?}");
        assert_eq!(number::<u32>(&attrs, DEVICE), Some(self.device));
        attrs
    }

    /// The attributes of the next event that is `command`.
    pub fn await_event(&self, command: u8) -> Vec<Attr> {
        loop {
            let (heard, attrs) = self.next_attributes();
            if heard == command {
                assert_eq!(number::<u32>(&attrs, DEVICE), Some(self.device));
                return attrs;
            }
        }
    }

    /// The next event.
    pub fn next(&self) -> Heard {
        let (command, attrs) = self.next_attributes();
        self.heard(command, &attrs)
    }

    fn heard(&self, command: u8, attrs: &[Attr]) -> Heard {
        assert_eq!(number::<u32>(attrs, DEVICE), Some(self.device));
        let number = |kind| number::<u32>(attrs, kind).expect("a number");
        match command {
            CONNECTED => Heard::Connected,
            CONNECTION_DEAD => Heard::Dead(number(CONNECTION), number(RECONNECTS), number(REASON)),
            RECONNECTED => Heard::Reconnected(number(CONNECTION), number(RECONNECTS)),
            DISCONNECTED => Heard::Disconnected,
            RESIZED => Heard::Resized(crate::netlink::number(attrs, SIZE).expect("a size")),
            other => panic!("event {other}: {attrs:?}"),
        }
    }

    /// Nothing was told, and nothing comes within a moment.
    pub fn expect_silence(&self) {
        thread::sleep(Duration::from_millis(200));
        let event = self.netlink.told().expect("nothing");
        let event = event.map(|(command, attrs)| self.heard(command, &attrs));
        assert_eq!(event, None);
    }
}
