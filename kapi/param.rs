// SPDX-License-Identifier: GPL-2.0
//! Integer module parameters that are visible in sysfs.
//!
//! Mirrors the `params` of `kernel::module!`. Those have the mode 0 (in 7.3), so sysfs does not
//! show them, and the module cannot change them.
//!
//! C header: [`include/linux/moduleparam.h`](srctree/include/linux/moduleparam.h)

use super::bindings;
use kernel::sync::atomic::{
    Atomic,
    Relaxed, //
};

/// A module parameter of the C type `int`.
///
/// It can be set when the module is loaded, and everybody can read it in sysfs (mode 0444).
#[repr(transparent)]
pub(crate) struct IntParameter(Atomic<i32>);

impl IntParameter {
    /// Creates a parameter with its default value.
    const fn new(default: i32) -> Self {
        IntParameter(Atomic::new(default))
    }

    /// Returns the value.
    pub(crate) fn get(&self) -> i32 {
        self.0.load(Relaxed)
    }

    /// Sets the value that user space reads.
    pub(crate) fn set(&self, value: i32) {
        self.0.store(value, Relaxed);
    }

    /// Describes the parameter to the kernel's parameter code.
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

/// Defines the [`IntParameter`]s in a list of `NAME = parameter: default, "description";`.
macro_rules! module_parameters {
    ($($(#[$doc:meta])* $static:ident = $name:ident: $default:literal, $description:literal;)*) => { $(
        $(#[$doc])*
        pub(crate) static $static: IntParameter = IntParameter::new($default);

        const _: () = {
            // The kernel looks for parameters, and `modinfo` for their descriptions, in sections
            // with these names.
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

// The driver defines the list of its parameters. The link sections are chosen here, since a section
// with the wrong contents is undefined behaviour, and only kapi may contain code that can cause
// that.
parameters!(module_parameters);

/// The version, which `modinfo` and `/sys/module` show. The macro `module!` cannot set it.
const VERSION: &str = concat!("version=", env!("RNBD_VERSION"), "\0");
#[link_section = ".modinfo"]
#[used(compiler)]
static MODINFO_VERSION: [u8; VERSION.len()] = bytes(VERSION);

/// Returns the bytes of `text`, which must have `N` of them.
const fn bytes<const N: usize>(text: &'static str) -> [u8; N] {
    match text.as_bytes().first_chunk() {
        Some(bytes) => *bytes,
        // Unreachable: `N` is always the length of `text`.
        None => [0; N],
    }
}
