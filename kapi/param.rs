// SPDX-License-Identifier: GPL-2.0
//! Module parameters that user space can read in sysfs. Mirrors the `params` of `kernel::module!`,
//! which (7.3) are invisible there. Source: `include/linux/moduleparam.h`.

use super::bindings;
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// A parameter that is a C `int`: set when the module is loaded, read by everybody (0444).
#[repr(transparent)]
pub(crate) struct IntParameter(Atomic<i32>);

impl IntParameter {
    /// With its default.
    const fn new(default: i32) -> Self {
        IntParameter(Atomic::new(default))
    }

    /// Its value.
    pub(crate) fn get(&self) -> i32 {
        self.0.load(Relaxed)
    }

    /// Sets what user space reads.
    pub(crate) fn set(&self, value: i32) {
        self.0.store(value, Relaxed);
    }

    /// What the kernel's parameter code needs to know.
    const fn describe(&'static self, name: &'static core::ffi::CStr) -> bindings::kernel_param {
        bindings::kernel_param {
            name: kernel::str::as_char_ptr_in_const_context(name),
            mod_: (&raw const bindings::__this_module).cast_mut(),
            ops: &raw const bindings::param_ops_int,
            perm: 0o444,
            level: -1,
            flags: 0,
            __bindgen_anon_1: bindings::kernel_param__bindgen_ty_1 {
                arg: core::ptr::from_ref(self).cast_mut().cast(),
            },
        }
    }
}

/// Defines module parameters, which are `IntParameter`s: `NAME = parameter: default, "description";`
/// each.
macro_rules! module_parameters {
    ($($(#[$doc:meta])* $static:ident = $name:ident: $default:literal, $description:literal;)*) => { $(
        $(#[$doc])*
        pub(crate) static $static: IntParameter = IntParameter::new($default);

        const _: () = {
            // The kernel looks for parameters, and `modinfo` for what is said of them, in sections with
            // these names, which hold such entries and such strings.
            #[link_section = "__param"]
            #[used(compiler)]
            static PARAMETER: ::kernel::module_param::KernelParam =
                ::kernel::module_param::KernelParam::new($static.describe(
                    ::kernel::c_str!(stringify!($name)),
                ));

            const TYPE: &str = concat!("parmtype=", stringify!($name), ":int\0");
            const TEXT: &str = concat!("parm=", stringify!($name), ":", $description, "\0");

            #[link_section = ".modinfo"]
            #[used(compiler)]
            static MODINFO_TYPE: [u8; TYPE.len()] = bytes(TYPE);
            #[link_section = ".modinfo"]
            #[used(compiler)]
            static MODINFO_TEXT: [u8; TEXT.len()] = bytes(TEXT);
        };
    )* };
}

// The driver has written down its parameters, but sections are chosen only here, where `unsafe` is
// allowed: with the wrong contents they would be that.
parameters!(module_parameters);

/// The bytes of a text that has `N` of them.
const fn bytes<const N: usize>(text: &'static str) -> [u8; N] {
    match text.as_bytes().first_chunk() {
        Some(bytes) => *bytes,
        // Of a text that has not, which is none.
        None => [0; N],
    }
}
