// SPDX-License-Identifier: GPL-2.0
//! Generic netlink families with commands. Their multicast groups are in `group.rs`.
//!
//! C headers: [`include/net/genetlink.h`](srctree/include/net/genetlink.h),
//! [`include/net/netlink.h`](srctree/include/net/netlink.h)
//!
//! Names and types follow `kernel::net::netlink`, which (7.3) supports multicast groups only.

use super::{
    attr::Attr,
    dump::{
        info_of,
        Dump, //
    },
    group::{
        copy_name,
        Group,
        Registered, //
    },
    message::{
        Destination,
        Message, //
    },
    namespace::Namespace,
    port::Sender, //
};
use crate::kapi::{
    bindings,
    errno::EOPNOTSUPP, //
};
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
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// The commands of a family.
pub(crate) trait Commands: Sized + Send + Sync + 'static {
    /// The name of the family. At most 15 bytes of it are used.
    const NAME: &'static CStr;
    /// The version of the family.
    const VERSION: u32;
    /// The policies of the attributes, indexed by attribute number. There must be at least numbers 0 and 1.
    const POLICY: &'static [Policy];
    /// The numbers of the commands that [`Self::run()`] carries out.
    const COMMANDS: &'static [u8];
    /// The commands that [`Self::dump()`] answers. Only a strict family may have any. The family must then not
    /// be unregistered before the module is unloaded.
    const DUMPS: &'static [List] = &[];
    /// Whether netlink refuses a message with an attribute that is unknown or has another length than its
    /// policy says.
    const STRICT: bool = false;

    /// Carries out a command.
    ///
    /// # Errors
    ///
    /// An error is returned to the sender of the command.
    ///
    /// # Context
    ///
    /// Process context. May sleep. Several commands may run at the same time.
    fn run(&self, _command: u8, _info: &Info<'_>) -> Result {
        Err(EOPNOTSUPP.into())
    }

    /// Adds messages to a part of the answer to a command, until all were added or [`Dump::add()`] fails.
    ///
    /// # Errors
    ///
    /// `EMSGSIZE` of [`Dump::add()`] ends the part, if it is not empty. Any other error ends the answer.
    ///
    /// # Context
    ///
    /// Process context. May sleep. Several commands may run at the same time.
    fn dump(&self, _command: u8, _dump: &mut Dump<'_>) -> Result {
        Err(EOPNOTSUPP.into())
    }
}

/// A command that is answered with a list.
pub(crate) struct List {
    /// The number of the command.
    pub(crate) command: u8,
    /// Whether the sender must have `CAP_NET_ADMIN` in the initial user namespace.
    pub(crate) privileged: bool,
}

/// The requirements for an attribute, against which netlink validates it (`struct nla_policy`).
#[repr(transparent)]
pub(crate) struct Policy(bindings::nla_policy);

// SAFETY: A policy is never written, so any task may read it.
unsafe impl Sync for Policy {}

impl Policy {
    pub(crate) const ANY: Policy = Self::of(bindings::NLA_UNSPEC);
    pub(crate) const U32: Policy = Self::of(bindings::NLA_U32);
    pub(crate) const U64: Policy = Self::of(bindings::NLA_U64);
    pub(crate) const BINARY: Policy = Self::of(bindings::NLA_BINARY);
    pub(crate) const STRING: Policy = Self::of(bindings::NLA_STRING);
    pub(crate) const FLAG: Policy = Self::of(bindings::NLA_FLAG);
    pub(crate) const NESTED: Policy = Self::of(bindings::NLA_NESTED);

    const fn of(kind: u32) -> Policy {
        let mut policy: bindings::nla_policy = pin_init::zeroed();
        policy.type_ = kind as u8;
        Policy(policy)
    }
}

/// A family, together with what its `struct genl_family` points to.
#[pin_data]
struct Family<C: Commands> {
    /// Points to `ops`, to `group`, if there is one, and to static data.
    #[pin]
    family: Opaque<bindings::genl_family>,
    ops: KVec<bindings::genl_small_ops>,
    group: Option<Arc<Group>>,
    commands: C,
}

/// A registered family, which has its multicast group. Dropping this unregisters the family, and waits
/// for the commands that are running.
///
/// # Invariants
///
/// The family is registered.
pub(crate) struct Registration<C: Commands>(Pin<KBox<Family<C>>>);

// SAFETY: Any task may unregister a family, and `Commands` are `Send`.
unsafe impl<C: Commands> Send for Registration<C> {}
// SAFETY: `&Registration` has no methods for other tasks to call.
unsafe impl<C: Commands> Sync for Registration<C> {}

impl<C: Commands> Registration<C> {
    /// Registers the family of `commands` and gives it the group, if there is one. A message that is sent to the group
    /// before this returns may be lost.
    ///
    /// # Errors
    ///
    /// - `EBUSY`: another family has the group.
    /// - `EEXIST`: a family of that name is registered already.
    /// - `ENOMEM`: there is no memory.
    ///
    /// # Context
    ///
    /// Process context. May sleep.
    pub(crate) fn new(commands: C, group: Option<Arc<Group>>) -> Result<Self> {
        // Nothing may fail once a family with dumps is registered: it must not be unregistered at once.
        let claim = group.as_ref().map(Group::claim).transpose()?;
        let family = Family::new(commands, group)?;
        let raw = family.family.get();
        // SAFETY: The family is pinned. Everything that it points to is static or is owned by it.
        to_result(unsafe { bindings::genl_register_family(raw) })?;
        // INVARIANT: The family was registered above.
        let this = Registration(family);
        // INVARIANT: The family is registered until `drop()`, which takes the group away before it
        // unregisters the family.
        if let Some(claim) = claim {
            claim.bind(Registered(this.raw()));
        }
        Ok(this)
    }

    fn raw(&self) -> NonNull<bindings::genl_family> {
        NonNull::from(&self.0.family).cast()
    }
}

impl<C: Commands> Drop for Registration<C> {
    fn drop(&mut self) {
        let raw = self.raw();
        if let Some(group) = &self.0.group {
            group.unbind(raw);
        }
        // SAFETY: By the type invariant, the family is registered. It is not used after this.
        unsafe { bindings::genl_unregister_family(raw.as_ptr()) };
    }
}

impl<C: Commands> Family<C> {
    /// The highest attribute number.
    const MAX_ATTR: u16 = {
        // If a family has no attributes, generic netlink gives its commands a null pointer instead of an
        // array.
        assert!(C::POLICY.len() > 1 && C::POLICY.len() <= 1 << 14);
        C::POLICY.len() as u16 - 1
    };

    fn new(commands: C, group: Option<Arc<Group>>) -> Result<Pin<KBox<Self>>> {
        let mut ops = KVec::with_capacity(C::COMMANDS.len() + C::DUMPS.len(), GFP_KERNEL)?;
        for command in C::COMMANDS {
            ops.push(Self::op(*command), GFP_KERNEL)?;
        }
        for list in C::DUMPS {
            ops.push(Self::dump_op(list), GFP_KERNEL)?;
        }
        let mut family: bindings::genl_family = pin_init::zeroed();
        copy_name(&mut family.name, C::NAME);
        family.version = C::VERSION;
        family.maxattr = u32::from(Self::MAX_ATTR);
        family.policy = C::POLICY.as_ptr().cast();
        family.module = (&raw const bindings::__this_module).cast_mut();
        family.small_ops = ops.as_ptr();
        family.n_small_ops = u8::try_from(ops.len())?;
        if let Some(group) = &group {
            family.mcgrps = &raw const group.raw;
            family.n_mcgrps = 1;
        }
        // Commands below this number may have anything in the reserved field of the header.
        let lax = C::COMMANDS.iter().copied().max().filter(|_| !C::STRICT);
        family.resv_start_op = lax.map_or(0, |c| c.saturating_add(1));
        family.set_netnsok(1);
        // Otherwise a command of this family would block those of all other families for as long as it runs.
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
        if !C::STRICT {
            op.validate = (bindings::genl_validate_flags_GENL_DONT_VALIDATE_STRICT
                | bindings::genl_validate_flags_GENL_DONT_VALIDATE_DUMP)
                as u8;
        }
        op.doit = Some(Self::doit);
        op
    }

    fn dump_op(list: &List) -> bindings::genl_small_ops {
        // nbd.c has no such command, so there is no reason to be lax.
        const { assert!(C::STRICT || C::DUMPS.is_empty()) };
        let mut op: bindings::genl_small_ops = pin_init::zeroed();
        op.cmd = list.command;
        if list.privileged {
            op.flags = bindings::GENL_ADMIN_PERM;
        }
        op.dumpit = Some(Self::dumpit);
        op
    }

    /// `genl_small_ops.doit`: carries out a command.
    ///
    /// # Safety
    ///
    /// Must be called by generic netlink, for a family of this type.
    unsafe extern "C" fn doit(
        skb: *mut bindings::sk_buff,
        raw: *mut bindings::genl_info,
    ) -> ffi::c_int {
        // SAFETY: Generic netlink passes a pointer to a valid `struct genl_info`, which lives during the
        // call.
        let (family, command) = unsafe { ((*raw).family, (*(*raw).genlhdr).cmd) };
        let family: *const Opaque<bindings::genl_family> = family.cast();
        // SAFETY: Each `struct genl_family` that has this function as an operation is the field of a `Self`.
        let this = unsafe { kernel::container_of!(family, Self, family) };
        // SAFETY: The family is not freed while it is registered, and unregistering it waits for this
        // command.
        let this = unsafe { &*this };
        // INVARIANT: `skb` and `raw` are those of this command. Generic netlink has parsed the message into
        // `maxattr + 1` attributes, which is `MAX_ATTR + 1`.
        let info = Info {
            skb,
            raw,
            max: Self::MAX_ATTR,
            _call: PhantomData,
        };
        from_result(|| this.commands.run(command, &info).map(|()| 0))
    }
}

impl<C: Commands> Family<C> {
    /// `genl_small_ops.dumpit`: makes a part of the answer to a command.
    ///
    /// # Safety
    ///
    /// Must be called by generic netlink, for a family of this type.
    unsafe extern "C" fn dumpit(
        part: *mut bindings::sk_buff,
        callback: *mut bindings::netlink_callback,
    ) -> ffi::c_int {
        // SAFETY: Generic netlink has passed this callback.
        let family = unsafe { (*info_of(callback)).family };
        let family: *const Opaque<bindings::genl_family> = family.cast();
        // SAFETY: Each `struct genl_family` that has this function as an operation is the field of a `Self`.
        let this = unsafe { kernel::container_of!(family, Self, family) };
        // SAFETY: A dump holds a reference to the module, and a family with dumps is not unregistered before
        // the module is unloaded.
        let this = unsafe { &*this };
        // SAFETY: Netlink has passed both for this call. `part` was allocated for it, and nobody else has it.
        // Generic netlink has parsed the message into `maxattr + 1` attributes.
        let mut dump = unsafe { Dump::new(part, callback, Self::MAX_ATTR) };
        let command = dump.command();
        from_result(|| {
            let result = this.commands.dump(command, &mut dump);
            match dump.len() {
                0 => result.map(|()| 0),
                // An error other than for lack of room will come again in the next part.
                len => Ok(ffi::c_int::try_from(len)?),
            }
        })
    }
}

/// The message of a command that is being carried out (`struct genl_info`).
///
/// # Invariants
///
/// - `skb` and `raw` belong to a command that runs for `'a`, and are valid for as long.
/// - `raw.attrs` is an array of `max + 1` pointers.
pub(crate) struct Info<'a> {
    skb: *mut bindings::sk_buff,
    raw: *mut bindings::genl_info,
    max: u16,
    _call: PhantomData<&'a ()>,
}

impl<'a> Info<'a> {
    /// Whether the sender may administer the system (`netlink_capable(skb, CAP_SYS_ADMIN)`).
    pub(crate) fn may_administer(&self) -> bool {
        // SAFETY: By the type invariant, `skb` is a valid message that was received.
        unsafe { bindings::netlink_capable(self.skb, bindings::CAP_SYS_ADMIN as i32) }
    }

    /// Returns the socket that has sent the message.
    ///
    /// It is not released while the command is running: the task that sends the message holds a
    /// reference to its file.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the message does not come from a socket.
    pub(crate) fn sender(&self) -> Result<Sender> {
        // SAFETY: By the type invariant, `skb` is a valid message that netlink has received, in whose
        // control buffer the sender's socket is (`NETLINK_CB()`).
        let sk = unsafe { (*(&raw const (*self.skb).cb).cast::<bindings::netlink_skb_parms>()).sk };
        let sk = NonNull::new(sk.cast()).ok_or(EINVAL)?;
        // SAFETY: By the type invariant, `raw` is valid. The sender's socket is valid during the call.
        Ok(unsafe { Sender::new(sk, (*self.raw)._net.net, (*self.raw).snd_portid) })
    }

    /// Returns the network namespace of the socket that has sent the message.
    ///
    /// # Errors
    ///
    /// `EINVAL`: the message does not come from a namespace.
    pub(crate) fn namespace(&self) -> Result<Namespace> {
        // SAFETY: By the type invariant, `raw` is valid.
        let net = NonNull::new(unsafe { (*self.raw)._net.net }).ok_or(EINVAL)?;
        // SAFETY: The sender's socket keeps its namespace alive while the command is running.
        Ok(unsafe { Namespace::get(net) })
    }

    /// Returns an attribute of the message, if the message has it.
    pub(crate) fn attr(&self, kind: u16) -> Option<Attr<'a>> {
        if kind > self.max {
            return None;
        }
        // SAFETY: By the type invariant, the array has a pointer with this index.
        let attr = unsafe { *(*self.raw).attrs.add(usize::from(kind)) };
        // SAFETY: Netlink has validated the length of each attribute in the array. The attribute is part
        // of the message, which by the type invariant is valid for `'a`.
        (!attr.is_null()).then(|| unsafe { Attr::from_raw(attr) })
    }

    /// Returns the kind of an attribute of the message that is none of `known`, if there is one.
    pub(crate) fn kind_other_than(&self, known: &[u16]) -> Option<u16> {
        let mut others = (1..=self.max).filter(|kind| !known.contains(kind));
        others.find(|kind| self.attr(*kind).is_some())
    }

    /// Returns an attribute of the message. If the message does not have it, reports to the sender which
    /// attribute is missing, with `message` (`GENL_REQ_ATTR_CHECK()`).
    ///
    /// # Errors
    ///
    /// `EINVAL` if the attribute is missing.
    pub(crate) fn require(&self, kind: u16, message: &'static CStr) -> Result<Attr<'a>> {
        self.attr(kind).ok_or_else(|| {
            // SAFETY: By the type invariant, `raw` is valid. Its `extack` is valid or null.
            if let Some(ack) = unsafe { (*self.raw).extack.as_mut() } {
                ack.miss_type = kind;
                ack._msg = message.as_char_ptr();
            }
            EINVAL
        })
    }

    /// Reports an error to the sender, with `message` (`GENL_SET_ERR_MSG()`). If `kind` is given, also
    /// reports which attribute is wrong.
    pub(crate) fn complain(&self, kind: Option<u16>, message: &'static CStr) {
        let bad = kind.and_then(|kind| self.attr(kind));
        // SAFETY: By the type invariant, `raw` is valid. Its `extack` is valid or null.
        if let Some(ack) = unsafe { (*self.raw).extack.as_mut() } {
            ack._msg = message.as_char_ptr();
            if let Some(bad) = bad {
                ack.bad_attr = bad.raw;
            }
        }
    }

    /// Whether the sender was told no words yet, of those that it may want.
    pub(crate) fn has_no_words(&self) -> bool {
        // SAFETY: By the type invariant, `raw` is valid. Its `extack` is valid or null.
        unsafe { (*self.raw).extack.as_ref() }.is_none_or(|ack| ack._msg.is_null())
    }

    /// Replies to the sender with a message that has one attribute.
    ///
    /// # Errors
    ///
    /// - `ENOMEM`: there is no memory.
    /// - `EMSGSIZE`: `value` is too long.
    /// - Those of `netlink_unicast()`.
    ///
    /// # Context
    ///
    /// Process context. May sleep.
    pub(crate) fn reply(&self, command: u8, kind: u16, value: &[u8]) -> Result {
        // SAFETY: By the type invariant, `raw` is valid.
        let (family, to, net) = unsafe {
            let raw = &*self.raw;
            let to = Destination {
                port: raw.snd_portid,
                sequence: raw.snd_seq,
            };
            (raw.family, to, raw._net.net)
        };
        let port = to.port;
        // SAFETY: By the type invariant, a command of the family is running, so the family is registered.
        let message =
            unsafe { Message::new(family, to, command, value.len(), bindings::GFP_KERNEL)? };
        let skb = message.finish(kind, value)?;
        // SAFETY: The sender's socket keeps its network namespace alive while the command is running.
        // Ownership of the message is passed on.
        let sent = unsafe {
            let flags = bindings::MSG_DONTWAIT as i32;
            bindings::netlink_unicast(bindings::genl_sock(net), skb, port, flags)
        };
        // A positive result is the number of bytes sent.
        to_result(sent.min(0))
    }
}
