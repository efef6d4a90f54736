// SPDX-License-Identifier: GPL-2.0
//! Generic netlink families with commands. Mirrors `kernel::net::netlink`, which (7.3) can only
//! multicast. Source: `include/net/genetlink.h`, `include/net/netlink.h`.

use super::attr::Attr;
use crate::kapi::bindings;
use core::{
    marker::PhantomData,
    ptr::NonNull, //
};
use kernel::{
    error::{
        from_result,
        to_result, //
    },
    ffi,
    new_mutex,
    prelude::*,
    sync::{
        Arc,
        Mutex, //
    },
    types::Opaque, //
};

/// What carries out a family's commands. They may sleep, and several may run at a time.
pub(crate) trait Commands: Sized + Send + Sync + 'static {
    /// The family's name.
    const NAME: &'static CStr;
    /// Its version.
    const VERSION: u32;
    /// What its attributes must be, by number; there is at least number 1.
    const POLICY: &'static [Policy];
    /// Its commands.
    const COMMANDS: &'static [u8];

    /// Carries out a command.
    fn run(&self, command: u8, info: &Info<'_>) -> Result;
}

/// What an attribute must be (`struct nla_policy`).
#[repr(transparent)]
pub(crate) struct Policy(bindings::nla_policy);

// SAFETY: Nothing changes a policy, so its pointers may be read by every task.
unsafe impl Sync for Policy {}

impl Policy {
    pub(crate) const ANY: Policy = Self::of(bindings::NLA_UNSPEC);
    pub(crate) const U32: Policy = Self::of(bindings::NLA_U32);
    pub(crate) const U64: Policy = Self::of(bindings::NLA_U64);
    pub(crate) const STRING: Policy = Self::of(bindings::NLA_STRING);
    pub(crate) const NESTED: Policy = Self::of(bindings::NLA_NESTED);

    const fn of(kind: u32) -> Policy {
        let mut policy: bindings::nla_policy = pin_init::zeroed();
        policy.type_ = kind as u8;
        Policy(policy)
    }
}

/// A multicast group of a family. It lives for as long as somebody may want to send to it, longer than
/// the family where need be: while no family has it, nobody listens.
#[pin_data]
pub(crate) struct Group {
    /// What a family's `mcgrps` points to.
    raw: bindings::genl_multicast_group,
    #[pin]
    family: Mutex<Option<Registered>>,
}

/// The family that has a [`Group`].
///
/// # Invariants
///
/// It is registered.
#[derive(PartialEq, Eq)]
struct Registered(NonNull<bindings::genl_family>);

// SAFETY: Every task may send a registered family's messages.
unsafe impl Send for Registered {}

impl Group {
    /// A group that no family has yet. Of the name the first 15 bytes count. May sleep.
    pub(crate) fn new(name: &CStr) -> Result<Arc<Self>> {
        let mut raw: bindings::genl_multicast_group = pin_init::zeroed();
        copy_name(&mut raw.name, name);
        Arc::pin_init(
            pin_init!(Group {
                raw,
                family <- new_mutex!(None),
            }),
            GFP_KERNEL,
        )
    }

    /// Sends everybody who listens in the first network namespace one attribute. Nobody does while no
    /// family has the group. Does not wait for I/O, but may sleep.
    ///
    /// # Errors
    ///
    /// `ENOMEM`; `ENOBUFS` where somebody has not heard it; `EMSGSIZE` where the value is too long.
    pub(crate) fn multicast(&self, command: u8, kind: u16, value: &[u8]) -> Result {
        let family = self.family.lock();
        let Some(Registered(family)) = &*family else {
            return Ok(());
        };
        let to = Address {
            port: 0,
            sequence: 0,
        };
        // SAFETY: By the invariant of `Registered` the family is registered: it is not unregistered
        // before `unbind()`, which waits for the lock that is held here.
        let message = unsafe {
            Message::new(
                family.as_ptr(),
                to,
                command,
                value.len(),
                bindings::GFP_NOIO,
            )?
        };
        let skb = message.finish(kind, value)?;
        // SAFETY: The family is registered, for the same reason; the message is handed over.
        let sent =
            unsafe { bindings::genlmsg_multicast(family.as_ptr(), skb, 0, 0, bindings::GFP_NOIO) };
        // ESRCH: nobody listens.
        match to_result(sent) {
            Err(e) if e == ESRCH => Ok(()),
            result => result,
        }
    }

    /// Gives the group to a family.
    ///
    /// # Errors
    ///
    /// `EBUSY` where another one has it.
    fn bind(&self, family: Registered) -> Result {
        let mut bound = self.family.lock();
        if bound.is_some() {
            return Err(EBUSY);
        }
        *bound = Some(family);
        Ok(())
    }

    /// Takes the group away from the family, if that has it. Nobody sends its messages afterwards.
    fn unbind(&self, family: NonNull<bindings::genl_family>) {
        let mut bound = self.family.lock();
        if *bound == Some(Registered(family)) {
            *bound = None;
        }
    }
}

/// A family, as generic netlink sees it.
#[pin_data]
struct Family<C: Commands> {
    /// Its pointers are to `ops`, `group` and what is static.
    #[pin]
    family: Opaque<bindings::genl_family>,
    ops: KVec<bindings::genl_small_ops>,
    group: Arc<Group>,
    commands: C,
}

/// A registered family, which has its multicast group. Dropping it waits for the commands that run.
///
/// # Invariants
///
/// The family is registered.
pub(crate) struct Registration<C: Commands>(Pin<KBox<Family<C>>>);

// SAFETY: Every task may unregister a family, and `Commands` are `Send`.
unsafe impl<C: Commands> Send for Registration<C> {}
// SAFETY: Nothing can be done with `&Registration`.
unsafe impl<C: Commands> Sync for Registration<C> {}

impl<C: Commands> Registration<C> {
    /// Registers the family of `commands` and gives it the group. A multicast that comes before this
    /// returns may be lost. May sleep.
    ///
    /// # Errors
    ///
    /// `EBUSY` where another family has the group, `EEXIST` where there is one of that name.
    pub(crate) fn new(commands: C, group: Arc<Group>) -> Result<Self> {
        let family = Family::new(commands, group)?;
        let raw = family.family.get();
        // SAFETY: What the family points to lives in it or for ever, and it stays where it is.
        to_result(unsafe { bindings::genl_register_family(raw) })?;
        // INVARIANT: It was registered just now.
        let this = Registration(family);
        // INVARIANT: It is registered until `drop`, which takes the group away before that ends.
        this.0.group.bind(Registered(this.raw()))?;
        Ok(this)
    }

    fn raw(&self) -> NonNull<bindings::genl_family> {
        NonNull::from(&self.0.family).cast()
    }
}

impl<C: Commands> Drop for Registration<C> {
    fn drop(&mut self) {
        let raw = self.raw();
        self.0.group.unbind(raw);
        // SAFETY: By the type invariant it is registered; it is not used any more after this.
        unsafe { bindings::genl_unregister_family(raw.as_ptr()) };
    }
}

impl<C: Commands> Family<C> {
    /// The highest number of an attribute.
    const MAX_ATTR: u16 = {
        // Without any attribute generic netlink would give the commands no array of them.
        assert!(C::POLICY.len() > 1 && C::POLICY.len() <= 1 << 14);
        C::POLICY.len() as u16 - 1
    };

    fn new(commands: C, group: Arc<Group>) -> Result<Pin<KBox<Self>>> {
        let mut ops = KVec::with_capacity(C::COMMANDS.len(), GFP_KERNEL)?;
        for command in C::COMMANDS {
            ops.push(Self::op(*command), GFP_KERNEL)?;
        }
        let mut family: bindings::genl_family = pin_init::zeroed();
        copy_name(&mut family.name, C::NAME);
        family.version = C::VERSION;
        family.maxattr = u32::from(Self::MAX_ATTR);
        family.policy = C::POLICY.as_ptr().cast();
        family.module = (&raw const bindings::__this_module).cast_mut();
        family.small_ops = ops.as_ptr();
        family.n_small_ops = u8::try_from(ops.len())?;
        family.mcgrps = &raw const group.raw;
        family.n_mcgrps = 1;
        family.resv_start_op = C::COMMANDS
            .iter()
            .copied()
            .max()
            .map_or(0, |c| c.saturating_add(1));
        family.set_netnsok(1);
        // Else the other families of the machine wait while a command does.
        family.set_parallel_ops(1);
        KBox::pin_init(
            pin_init!(Self {
                family: Opaque::new(family),
                ops,
                group,
                commands,
            }),
            GFP_KERNEL,
        )
    }

    fn op(command: u8) -> bindings::genl_small_ops {
        let mut op: bindings::genl_small_ops = pin_init::zeroed();
        op.cmd = command;
        op.validate = (bindings::genl_validate_flags_GENL_DONT_VALIDATE_STRICT
            | bindings::genl_validate_flags_GENL_DONT_VALIDATE_DUMP) as u8;
        op.doit = Some(Self::doit);
        op
    }

    /// `genl_small_ops.doit`
    ///
    /// # Safety
    ///
    /// To be called by generic netlink for a family of this type.
    unsafe extern "C" fn doit(
        skb: *mut bindings::sk_buff,
        raw: *mut bindings::genl_info,
    ) -> ffi::c_int {
        // SAFETY: Generic netlink gives a description of the message that lives during the call.
        let (family, command) = unsafe { ((*raw).family, (*(*raw).genlhdr).cmd) };
        let family: *const Opaque<bindings::genl_family> = family.cast();
        // SAFETY: Each family that has this function as an operation is the field of a `Self`.
        let this = unsafe { kernel::container_of!(family, Self, family) };
        // SAFETY: It is not dropped while it is registered, and unregistering waits for this command.
        let this = unsafe { &*this };
        // INVARIANT: They are those of this command, until it returns; the policy has
        // `MAX_ATTR + 1` places, so the array of the attributes has, too.
        let info = Info {
            skb,
            raw,
            max: Self::MAX_ATTR,
            _call: PhantomData,
        };
        from_result(|| this.commands.run(command, &info).map(|()| 0))
    }
}

fn copy_name(to: &mut [ffi::c_char; 16], name: &CStr) {
    // The last byte stays zero.
    for (to, from) in to.iter_mut().take(15).zip(name.to_bytes()) {
        *to = *from as ffi::c_char;
    }
}

/// A command's message (`struct genl_info`).
///
/// # Invariants
///
/// `skb` and `raw` are those of a command that runs for `'a`; `raw.attrs` has `max + 1` places.
pub(crate) struct Info<'a> {
    skb: *mut bindings::sk_buff,
    raw: *mut bindings::genl_info,
    max: u16,
    _call: PhantomData<&'a ()>,
}

impl<'a> Info<'a> {
    /// Whether the sender may administer the system (`netlink_capable(skb, CAP_SYS_ADMIN)`).
    pub(crate) fn may_administer(&self) -> bool {
        // SAFETY: By the type invariant `skb` is the message of a command that runs.
        unsafe { bindings::netlink_capable(self.skb, bindings::CAP_SYS_ADMIN as i32) }
    }

    /// An attribute of the message.
    pub(crate) fn attr(&self, kind: u16) -> Option<Attr<'a>> {
        if kind > self.max {
            return None;
        }
        // SAFETY: By the type invariant there is such a place.
        let attr = unsafe { *(*self.raw).attrs.add(usize::from(kind)) };
        // SAFETY: Where there is such an attribute netlink has checked its length, and it lives as long as
        // the message, which is that of a command that runs for `'a`.
        (!attr.is_null()).then(|| unsafe { Attr::from_raw(attr) })
    }

    /// As [`Self::attr()`]; tells the sender where it is missing (`GENL_REQ_ATTR_CHECK()`).
    pub(crate) fn require(&self, kind: u16, message: &'static CStr) -> Result<Attr<'a>> {
        self.attr(kind).ok_or_else(|| {
            // SAFETY: By the type invariant `raw` is valid. There may be no extended acknowledgement.
            if let Some(ack) = unsafe { (*self.raw).extack.as_mut() } {
                ack.miss_type = kind;
                ack._msg = message.as_char_ptr();
            }
            EINVAL
        })
    }

    /// Tells the sender what is wrong (`GENL_SET_ERR_MSG()`), with which attribute where one is named.
    pub(crate) fn complain(&self, kind: Option<u16>, message: &'static CStr) {
        let bad = kind.and_then(|kind| self.attr(kind));
        // SAFETY: By the type invariant `raw` is valid. There may be no extended acknowledgement.
        if let Some(ack) = unsafe { (*self.raw).extack.as_mut() } {
            ack._msg = message.as_char_ptr();
            if let Some(bad) = bad {
                ack.bad_attr = bad.raw;
            }
        }
    }

    /// Answers with one attribute. May sleep.
    pub(crate) fn reply(&self, command: u8, kind: u16, value: &[u8]) -> Result {
        // SAFETY: By the type invariant the message's description is valid.
        let (family, to, net) = unsafe {
            let raw = &*self.raw;
            let to = Address {
                port: raw.snd_portid,
                sequence: raw.snd_seq,
            };
            (raw.family, to, raw._net.net)
        };
        let port = to.port;
        // SAFETY: The family is registered: by the type invariant a command of it runs.
        let message =
            unsafe { Message::new(family, to, command, value.len(), bindings::GFP_KERNEL)? };
        let skb = message.finish(kind, value)?;
        // SAFETY: The sender's socket keeps its network namespace while its command runs. The message
        // is handed over.
        let sent = unsafe {
            let flags = bindings::MSG_DONTWAIT as i32;
            bindings::netlink_unicast((*net).genl_sock, skb, port, flags)
        };
        // How much was sent does not matter.
        to_result(sent.min(0))
    }
}

/// To whom a message goes, and what it answers.
struct Address {
    port: u32,
    sequence: u32,
}

/// A message that is being made.
///
/// # Invariants
///
/// `skb` is a message that nobody else knows, and `header` what `genlmsg_put()` has put into it.
struct Message {
    skb: NonNull<bindings::sk_buff>,
    header: NonNull<ffi::c_void>,
}

impl Message {
    /// Begins a message with room for an attribute of `len` bytes.
    ///
    /// # Safety
    ///
    /// The family must be registered.
    unsafe fn new(
        family: *const bindings::genl_family,
        to: Address,
        command: u8,
        len: usize,
        flags: u32,
    ) -> Result<Self> {
        if len > usize::from(u16::MAX) - size_of::<bindings::nlattr>() {
            return Err(EMSGSIZE);
        }
        let room = (len + size_of::<bindings::nlattr>()).next_multiple_of(4);
        // SAFETY: It takes any size and any flags.
        let skb = unsafe { bindings::genlmsg_new(room, flags) };
        let skb = NonNull::new(skb).ok_or(ENOMEM)?;
        let (port, sequence) = (to.port, to.sequence);
        // SAFETY: The message is new, and by this function's precondition the family is registered.
        let header =
            unsafe { bindings::genlmsg_put(skb.as_ptr(), port, sequence, family, 0, command) };
        let Some(header) = NonNull::new(header) else {
            // SAFETY: Nobody else knows the message.
            unsafe { bindings::nlmsg_free(skb.as_ptr()) };
            return Err(EMSGSIZE);
        };
        // INVARIANT: The message was made here, and the header put into it.
        Ok(Message { skb, header })
    }

    /// Appends an attribute and completes the message, which is the caller's to send or to free.
    fn finish(self, kind: u16, value: &[u8]) -> Result<*mut bindings::sk_buff> {
        let skb = self.skb.as_ptr();
        let len = i32::try_from(value.len())?;
        // SAFETY: By the type invariant the message is ours; `value` has so many bytes.
        to_result(unsafe { bindings::nla_put(skb, i32::from(kind), len, value.as_ptr().cast()) })?;
        // SAFETY: By the type invariant the header is this message's.
        unsafe { bindings::genlmsg_end(skb, self.header.as_ptr()) };
        core::mem::forget(self);
        Ok(skb)
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        // SAFETY: By the type invariant nobody else knows the message.
        unsafe { bindings::nlmsg_free(self.skb.as_ptr()) };
    }
}
