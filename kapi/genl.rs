// SPDX-License-Identifier: GPL-2.0
//! Generic netlink families with commands. Mirrors `kernel::net::netlink`, which (7.3) can only
//! multicast. Source: `include/net/genetlink.h`, `include/net/netlink.h`.

use super::bindings;
use core::{marker::PhantomData, marker::PhantomPinned};
use kernel::{
    error::{from_result, to_result},
    ffi,
    prelude::*,
    sync::atomic::{Acquire, Atomic, Full},
    types::Opaque,
};

/// What carries out a family's commands. They may sleep, and several may run at a time.
pub(crate) trait Commands: Sized + Send + Sync + 'static {
    /// The family's name.
    const NAME: &'static CStr;
    /// Its version.
    const VERSION: u32;
    /// Its multicast group.
    const GROUP: &'static CStr;
    /// What its attributes must be, by number.
    const POLICY: &'static [Policy];
    /// Its commands.
    const COMMANDS: &'static [u8];

    /// Carries out a command.
    fn run(&self, command: u8, info: &Info<'_>) -> Result;
}

/// What an attribute must be (`struct nla_policy`).
#[repr(transparent)]
pub(crate) struct Policy(bindings::nla_policy);

// SAFETY: It never changes.
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

/// The family that is registered, for multicasts.
static REGISTERED: Atomic<*mut bindings::genl_family> = Atomic::new(core::ptr::null_mut());

/// A registered family. Dropping it waits for the commands that run.
///
/// # Invariants
///
/// `family` is registered, and its pointers are to the fields beside it.
#[pin_data(PinnedDrop)]
pub(crate) struct Family<C: Commands> {
    #[pin]
    family: Opaque<bindings::genl_family>,
    group: Opaque<bindings::genl_multicast_group>,
    ops: KVec<bindings::genl_small_ops>,
    commands: C,
    #[pin]
    _pin: PhantomPinned,
}

// SAFETY: `Commands` are `Send` and `Sync`; the rest does not change after registration.
unsafe impl<C: Commands> Send for Family<C> {}
// SAFETY: As above.
unsafe impl<C: Commands> Sync for Family<C> {}

impl<C: Commands> Family<C> {
    /// Registers the family of `commands`. May sleep.
    pub(crate) fn register(commands: C) -> Result<Pin<KBox<Self>>> {
        let mut ops = KVec::with_capacity(C::COMMANDS.len(), GFP_KERNEL)?;
        for command in C::COMMANDS {
            let mut op: bindings::genl_small_ops = pin_init::zeroed();
            op.cmd = *command;
            op.validate = (bindings::genl_validate_flags_GENL_DONT_VALIDATE_STRICT
                | bindings::genl_validate_flags_GENL_DONT_VALIDATE_DUMP)
                as u8;
            op.doit = Some(Self::doit);
            ops.push(op, GFP_KERNEL)?;
        }
        let mut group: bindings::genl_multicast_group = pin_init::zeroed();
        copy_name(&mut group.name, C::GROUP);
        let this = KBox::pin_init(
            try_pin_init!(Self {
                family: Opaque::new(pin_init::zeroed()),
                group: Opaque::new(group),
                ops,
                commands,
                _pin: PhantomPinned,
            }? Error),
            GFP_KERNEL,
        );
        // Without the family's registration there is nothing to undo, so `drop` looks.
        let this = this?;
        let raw = this.family.get();
        // SAFETY: Nobody knows the family yet. What it points to lives beside it, and is pinned.
        unsafe {
            let mut family: bindings::genl_family = pin_init::zeroed();
            copy_name(&mut family.name, C::NAME);
            family.version = C::VERSION;
            family.maxattr = C::POLICY.len() as u32 - 1;
            family.policy = C::POLICY.as_ptr().cast();
            family.module = (&raw const bindings::__this_module).cast_mut();
            family.small_ops = this.ops.as_ptr();
            family.n_small_ops = this.ops.len() as u8;
            family.mcgrps = this.group.get();
            family.n_mcgrps = 1;
            family.resv_start_op = C::COMMANDS.iter().copied().max().unwrap_or(0) + 1;
            family.set_netnsok(1);
            // Else the other families of the machine wait while a command does.
            family.set_parallel_ops(1);
            raw.write(family);
            to_result(bindings::genl_register_family(raw))?;
        }
        REGISTERED.xchg(raw, Full);
        Ok(this)
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
        // SAFETY: The family is the field of a `Self`, which is not dropped while a command runs.
        let (this, command) = unsafe {
            let family: *const Opaque<bindings::genl_family> = (*raw).family.cast();
            let this = kernel::container_of!(family, Self, family);
            (&*this, (*(*raw).genlhdr).cmd)
        };
        let info = Info {
            skb,
            raw,
            max: C::POLICY.len() as u16 - 1,
            _call: PhantomData,
        };
        from_result(|| this.commands.run(command, &info).map(|()| 0))
    }
}

#[pinned_drop]
impl<C: Commands> PinnedDrop for Family<C> {
    fn drop(self: Pin<&mut Self>) {
        let raw = self.family.get();
        if REGISTERED.cmpxchg(raw, core::ptr::null_mut(), Full).is_ok() {
            // SAFETY: It was registered.
            unsafe { bindings::genl_unregister_family(raw) };
        }
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
/// `skb` and `raw` are those of a command that runs; `raw.attrs` has `max + 1` places.
pub(crate) struct Info<'a> {
    skb: *mut bindings::sk_buff,
    raw: *mut bindings::genl_info,
    max: u16,
    _call: PhantomData<&'a ()>,
}

impl<'a> Info<'a> {
    /// Whether the sender may administer the system (`netlink_capable(skb, CAP_SYS_ADMIN)`).
    pub(crate) fn may_administer(&self) -> bool {
        // SAFETY: By the type invariant.
        unsafe { bindings::netlink_capable(self.skb, bindings::CAP_SYS_ADMIN as i32) }
    }

    /// An attribute of the message.
    pub(crate) fn attr(&self, kind: u16) -> Option<Attr<'a>> {
        if kind > self.max {
            return None;
        }
        // SAFETY: By the type invariant there is such a place; what it points to lives as long as the
        // message.
        unsafe {
            let attr = *(*self.raw).attrs.add(usize::from(kind));
            (!attr.is_null()).then(|| Attr::from_raw(attr))
        }
    }

    /// As [`Self::attr()`]; tells the sender where it is missing (`GENL_REQ_ATTR_CHECK()`).
    pub(crate) fn require(&self, kind: u16, message: &'static CStr) -> Result<Attr<'a>> {
        self.attr(kind).ok_or_else(|| {
            // SAFETY: By the type invariant; there may be no extended acknowledgement.
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
        // SAFETY: By the type invariant; there may be no extended acknowledgement.
        if let Some(ack) = unsafe { (*self.raw).extack.as_mut() } {
            ack._msg = message.as_char_ptr();
            if let Some(bad) = bad {
                ack.bad_attr = bad.raw;
            }
        }
    }

    /// Answers with one attribute. May sleep.
    pub(crate) fn reply(&self, command: u8, kind: u16, value: &[u8]) -> Result {
        // SAFETY: By the type invariant.
        let (family, port, sequence, net) = unsafe {
            let raw = &*self.raw;
            (raw.family, raw.snd_portid, raw.snd_seq, raw._net.net)
        };
        let skb = message(
            family,
            port,
            sequence,
            command,
            kind,
            value,
            bindings::GFP_KERNEL,
        )?;
        // SAFETY: The message is complete, and handed over.
        let sent = unsafe {
            let flags = bindings::MSG_DONTWAIT as i32;
            bindings::netlink_unicast((*net).genl_sock, skb, port, flags)
        };
        // How much was sent does not matter.
        to_result(sent.min(0))
    }
}

/// Sends everybody who listens one attribute. Nothing happens where no family is registered. Does not
/// wait for I/O, but may sleep.
pub(crate) fn multicast(command: u8, kind: u16, value: &[u8]) -> Result {
    let family = REGISTERED.load(Acquire);
    if family.is_null() {
        return Ok(());
    }
    let skb = message(family, 0, 0, command, kind, value, bindings::GFP_NOIO)?;
    // SAFETY: The family is registered: it is not unregistered while a device is connected. The message
    // is complete, and handed over.
    let sent = unsafe { bindings::genlmsg_multicast(family, skb, 0, 0, bindings::GFP_NOIO) };
    // ESRCH: nobody listens.
    match to_result(sent) {
        Err(e) if e == ESRCH => Ok(()),
        result => result,
    }
}

fn message(
    family: *const bindings::genl_family,
    port: u32,
    sequence: u32,
    command: u8,
    kind: u16,
    value: &[u8],
    flags: u32,
) -> Result<*mut bindings::sk_buff> {
    let len = i32::try_from(value.len()).map_err(|_| EMSGSIZE)?;
    if value.len() > usize::from(u16::MAX) - size_of::<bindings::nlattr>() {
        return Err(EMSGSIZE);
    }
    let room = (value.len() + size_of::<bindings::nlattr>()).next_multiple_of(4);
    // SAFETY: The family is valid; the message is built before anybody sees it, and freed where it
    // cannot be.
    unsafe {
        let skb = bindings::genlmsg_new(room, flags);
        if skb.is_null() {
            return Err(ENOMEM);
        }
        let header = bindings::genlmsg_put(skb, port, sequence, family, 0, command);
        let put = bindings::nla_put(skb, i32::from(kind), len, value.as_ptr().cast());
        if header.is_null() || put != 0 {
            bindings::nlmsg_free(skb);
            return Err(EMSGSIZE);
        }
        bindings::genlmsg_end(skb, header);
        Ok(skb)
    }
}

/// An attribute.
///
/// # Invariants
///
/// `raw` and the value behind it are valid for `'a`.
#[derive(Clone, Copy)]
pub(crate) struct Attr<'a> {
    raw: *const bindings::nlattr,
    value: &'a [u8],
}

impl<'a> Attr<'a> {
    /// # Safety
    ///
    /// `raw` must be an attribute whose length netlink has checked, and live for `'a`.
    unsafe fn from_raw(raw: *const bindings::nlattr) -> Self {
        const HEADER: usize = size_of::<bindings::nlattr>();
        // SAFETY: The caller promises so.
        let value = unsafe {
            let len = usize::from((*raw).nla_len).saturating_sub(HEADER);
            core::slice::from_raw_parts(raw.cast::<u8>().add(HEADER), len)
        };
        // INVARIANT: The caller promises so.
        Attr { raw, value }
    }

    /// Its value, if it is long enough for one.
    pub(crate) fn u32(&self) -> Option<u32> {
        self.value.first_chunk().map(|b| u32::from_ne_bytes(*b))
    }

    /// Its value, if it is long enough for one.
    pub(crate) fn u64(&self) -> Option<u64> {
        self.value.first_chunk().map(|b| u64::from_ne_bytes(*b))
    }

    /// Its value as a string, up to the first zero byte.
    pub(crate) fn string(&self) -> &'a [u8] {
        self.value.split(|b| *b == 0).next().unwrap_or(&[])
    }

    /// The attributes within it: type and value of each. Ends where one is malformed.
    pub(crate) fn nested(&self) -> Nested<'a> {
        Nested { rest: self.value }
    }
}

/// See [`Attr::nested()`].
pub(crate) struct Nested<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Nested<'a> {
    type Item = (u16, Nested<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        let ([l0, l1, t0, t1], _) = self.rest.split_first_chunk()?;
        let len = usize::from(u16::from_ne_bytes([*l0, *l1]));
        let kind = u16::from_ne_bytes([*t0, *t1]) & bindings::NLA_TYPE_MASK as u16;
        let value = self.rest.get(size_of::<bindings::nlattr>()..len)?;
        let next = len.next_multiple_of(bindings::NLA_ALIGNTO as usize);
        self.rest = self.rest.get(next..).unwrap_or(&[]);
        Some((kind, Nested { rest: value }))
    }
}

impl Nested<'_> {
    /// What is left, as a value.
    pub(crate) fn u32(&self) -> Option<u32> {
        self.rest.first_chunk().map(|b| u32::from_ne_bytes(*b))
    }
}

/// Appends an attribute to `to`, padded (`nla_put()`).
pub(crate) fn put(to: &mut KVec<u8>, kind: u16, value: &[u8]) -> Result {
    let len = value.len() + size_of::<bindings::nlattr>();
    let len = u16::try_from(len).map_err(|_| EMSGSIZE)?;
    to.extend_from_slice(&len.to_ne_bytes(), GFP_KERNEL)?;
    to.extend_from_slice(&kind.to_ne_bytes(), GFP_KERNEL)?;
    to.extend_from_slice(value, GFP_KERNEL)?;
    while to.len() % bindings::NLA_ALIGNTO as usize != 0 {
        to.push(0, GFP_KERNEL)?;
    }
    Ok(())
}
