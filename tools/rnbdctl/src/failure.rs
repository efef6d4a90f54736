// SPDX-License-Identifier: GPL-2.0

//! Why a command has failed, and the status with which the program then exits.

use std::fmt::Display;

use rustix::io::Errno;

use crate::log::tell;

/// The exit statuses. clap ends the program with 2 where the command line is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// None of the others.
    Failed = 1,
    /// The command line can be parsed, but makes no sense.
    Usage = 2,
    /// The device, or one of its sockets, is in use.
    Busy = 3,
    /// It takes a privilege that the caller does not have.
    Permission = 4,
    /// There is no such device, or it is not connected, or no driver is loaded.
    NoDevice = 5,
    /// No server was reached, or what was reached does not speak NBD.
    Unreachable = 6,
    /// The server has refused what it was asked for.
    Refused = 7,
}

/// What failed, in which step, and what the reader can do.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {what}")]
pub struct Failure {
    pub exit: Exit,
    step: String,
    what: String,
    advice: Option<String>,
}

impl Failure {
    pub fn new(exit: Exit, step: impl Into<String>, what: impl Display) -> Self {
        Self {
            exit,
            step: step.into(),
            what: what.to_string(),
            advice: None,
        }
    }

    /// Adds what the reader can do. The first advice is the closest to the cause, and stays.
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice.get_or_insert_with(|| advice.into());
        self
    }

    /// As [`Self::advise`], where there may be nothing to say.
    pub fn advise_if_any(self, advice: Option<impl Into<String>>) -> Self {
        match advice {
            Some(advice) => self.advise(advice),
            None => self,
        }
    }

    /// A step of which this one was a part; the status and the advice stay.
    pub fn within(self, step: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            step: step.into(),
            what: what.into(),
            ..self
        }
    }

    /// Tells it to people, if they read it.
    pub fn report(&self) {
        tell(&self.to_string());
        if let Some(advice) = &self.advice {
            tell(advice);
        }
    }
}

/// What the kernel has refused, with the words that it has added.
pub fn refused_by_kernel(step: &str, errno: Errno, words: Option<&str>) -> Failure {
    let error = std::io::Error::from(errno);
    let what = match words {
        Some(words) => format!("the kernel says \"{words}\" ({error})"),
        None if errno == Errno::BUSY => format!("it is in use ({error})"),
        None => format!("the kernel says no ({error})"),
    };
    match errno {
        Errno::BUSY => Failure::new(Exit::Busy, step, what).advise(
            "Name another device, or none to have an unused one chosen; \"rnbdctl list\" shows what is \
             connected.",
        ),
        Errno::PERM | Errno::ACCESS => Failure::new(Exit::Permission, step, what)
            .advise("This takes root, or the capability CAP_SYS_ADMIN."),
        _ => Failure::new(Exit::Failed, step, what).advise_if_any(
            words
                .is_none()
                .then_some("The kernel's log (dmesg) may say more."),
        ),
    }
}
