// SPDX-License-Identifier: GPL-2.0
//! Events for user space: that a device was connected, that a connection has died, and so on. The netlink family
//! "rnbd" multicasts them.
//!
//! Whoever has something to tell, in any context, appends it to one list for all devices, without a lock and
//! without allocating memory: a [`Notice`] was allocated before. A work item sends what is in the list, so that
//! listeners hear of events in the order in which they were posted.

#![forbid(unsafe_code)]

use crate::{
    kapi::{
        llist::List,
        net::namespace::Namespace,
        prepared::Item,
        wq::Queue, //
    },
    pure::chunk::Text,
};
use kernel::{
    alloc::flags::{
        GFP_NOWAIT,
        __GFP_NOWARN, //
    },
    impl_has_work,
    new_work,
    prelude::*,
    str::CString,
    sync::Arc,
    workqueue::{
        Work,
        WorkItem, //
    }, //
};

/// Of which session an event is, and who hears of it.
pub(crate) struct Origin {
    /// The index of the device.
    pub(crate) device: u32,
    /// The identifier of the backend, if there is one.
    pub(crate) backend: Option<CString>,
    /// The network namespace of whoever has connected the device.
    pub(crate) namespace: Arc<Namespace>,
}

/// Why a connection has died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reason {
    /// The server has closed it.
    Closed = 0,
    /// Receiving has failed.
    ReceiveFailed = 1,
    /// Sending has failed.
    SendFailed = 2,
    /// The server has violated the protocol.
    ProtocolViolated = 3,
    /// A request has timed out.
    TimedOut = 4,
    /// The server is shutting down (`NBD_ESHUTDOWN`).
    ShuttingDown = 5,
    /// A new connection has taken its place.
    Replaced = 6,
    /// It was given up for a new connection, which could not be used.
    ReplacementFailed = 7,
    /// The server uses another TLS key. Only user space could give that to the kernel.
    WantsRekeying = 8,
    /// The session has ended. Nobody is told of the connection then.
    Ended = 9,
}

impl Reason {
    /// Returns the reason's name in `Documentation/netlink/rnbd.yaml`; `ended`, which is not there, in trace events.
    pub(crate) fn name(self) -> &'static CStr {
        match self {
            Reason::Closed => c"closed",
            Reason::ReceiveFailed => c"receive-failed",
            Reason::SendFailed => c"send-failed",
            Reason::ProtocolViolated => c"protocol-violated",
            Reason::TimedOut => c"timed-out",
            Reason::ShuttingDown => c"shutting-down",
            Reason::Replaced => c"replaced",
            Reason::ReplacementFailed => c"replacement-failed",
            Reason::WantsRekeying => c"wants-rekeying",
            Reason::Ended => c"ended",
        }
    }
}

/// Why a connection has died, with the error number if there is one.
#[derive(Clone, Copy)]
pub(crate) struct Death {
    pub(crate) reason: Reason,
    /// A positive error number, or 0.
    pub(crate) errno: u16,
}

impl Death {
    /// A death for another reason than an error.
    pub(crate) fn of(reason: Reason) -> Self {
        Death { reason, errno: 0 }
    }

    /// A death because of an error.
    pub(crate) fn by(reason: Reason, error: Error) -> Self {
        let errno = error.to_errno().unsigned_abs();
        Death {
            reason,
            errno: u16::try_from(errno).unwrap_or(0),
        }
    }
}

/// A connection of a session, past or present.
#[derive(Clone, Copy)]
pub(crate) struct Incarnation {
    /// The place of the connection in its session.
    pub(crate) index: u16,
    /// How often the connection at this place had been replaced when this one took it.
    pub(crate) reconnects: u32,
}

/// The size of a device.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    pub(crate) bytes: u64,
    pub(crate) block_bytes: u32,
}

/// What is told of a session that was started.
#[derive(Clone, Copy)]
pub(crate) struct Connected {
    pub(crate) size: Size,
    /// The server's transmission flags (`NBD_FLAG_*`).
    pub(crate) flags: u32,
    pub(crate) connections: u32,
    /// The thread that has started the session.
    pub(crate) pid: i32,
    /// It was started by netlink.
    pub(crate) by_netlink: bool,
}

/// An error that the server has returned for a command.
pub(crate) struct ServerFailure {
    pub(crate) incarnation: Incarnation,
    /// The number in the reply, which is one of the protocol's.
    pub(crate) error: u32,
    /// The number of the command (`NBD_CMD_*`).
    pub(crate) command: u16,
    pub(crate) offset_bytes: u64,
    pub(crate) len_bytes: u32,
    /// The offset in the export where the error is, if the server has told that.
    pub(crate) at: Option<u64>,
    /// What the server has said.
    pub(crate) text: Text,
}

/// What has happened.
pub(crate) enum Event {
    Connected(Connected),
    ConnectionDead(Incarnation, Death),
    Reconnected(Incarnation),
    Disconnected,
    Resized(Size),
    ServerError(KBox<ServerFailure>),
}

/// Sends events to user space. `rnbd_netlink/events.rs` implements it.
pub(crate) trait Listeners: Send + Sync {
    /// Returns whether anybody may be listening.
    ///
    /// # Context
    ///
    /// Any context, including softirq.
    fn are_there(&self, origin: &Origin) -> bool;

    /// Sends an event to those who listen.
    ///
    /// # Context
    ///
    /// May sleep, but does not wait for I/O.
    fn tell(&self, origin: &Origin, event: &Event);
}

/// An event and its origin.
struct News {
    origin: Arc<Origin>,
    event: Event,
}

/// The memory for one event.
pub(crate) struct Notice(KBox<Item<News>>);

impl Notice {
    /// Allocates memory for an event of a session.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    ///
    /// # Context
    ///
    /// May sleep.
    pub(crate) fn new(origin: &Arc<Origin>) -> Result<Self> {
        Ok(Notice(Item::new(News {
            origin: origin.clone(),
            // Any will do until the notice is posted.
            event: Event::Disconnected,
        })?))
    }
}

/// The events of all devices that were not sent yet.
#[pin_data]
pub(crate) struct EventQueue {
    news: List<KBox<Item<News>>>,
    listeners: Arc<dyn Listeners>,
    #[pin]
    work: Work<EventQueue>,
    /// The workqueue for work that may wait for memory. It is the last field, so that it is dropped last: the
    /// module may be unloaded once the last reference to it is gone.
    queue: Arc<Queue>,
}

impl_has_work! {
    impl HasWork<Self> for EventQueue { self.work }
}

impl WorkItem for EventQueue {
    type Pointer = Arc<EventQueue>;

    /// Sends all events. The same work item never runs twice at a time, so they stay in order.
    fn run(this: Arc<EventQueue>) {
        let mut batch = this.news.take();
        while let Some(item) = batch.pop() {
            this.listeners.tell(&item.value.origin, &item.value.event);
        }
    }
}

impl EventQueue {
    /// Returns an empty queue, which is emptied on the workqueue `queue`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(listeners: Arc<dyn Listeners>, queue: Arc<Queue>) -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(EventQueue {
                news: List::new(),
                listeners,
                work <- new_work!("rnbd::events"),
                queue,
            }),
            GFP_KERNEL,
        )
    }

    /// Has listeners told of an event, if there are any now.
    ///
    /// # Context
    ///
    /// Any context, including softirq.
    pub(crate) fn post(self: &Arc<Self>, notice: Notice, event: Event) {
        let Notice(mut item) = notice;
        // Mostly nobody does, and then no worker is woken up for it. The session has the origin, too, so that is
        // not freed here.
        if !self.listeners.are_there(&item.value.origin) {
            return;
        }
        item.value.event = event;
        self.append(item);
    }

    /// Has listeners told of an error that the server has returned, if there are any now. Without memory, they are not
    /// told.
    ///
    /// # Context
    ///
    /// Any context, including softirq.
    pub(crate) fn post_server_error(
        self: &Arc<Self>,
        origin: &Arc<Origin>,
        failure: impl FnOnce() -> ServerFailure,
    ) {
        if !self.listeners.are_there(origin) {
            return;
        }
        let Ok(failure) = KBox::new(failure(), GFP_NOWAIT | __GFP_NOWARN) else {
            return;
        };
        let news = Item::new_at_once(News {
            origin: origin.clone(),
            event: Event::ServerError(failure),
        });
        if let Ok(news) = news {
            self.append(news);
        }
    }

    /// Appends an event to those that were not sent yet.
    fn append(self: &Arc<Self>, news: KBox<Item<News>>) {
        // The list is never closed.
        let _ = self.news.push(news);
        // If the work is queued already, it will find the event.
        let _ = self.queue.enqueue::<Arc<Self>, 0>(self.clone());
    }
}
