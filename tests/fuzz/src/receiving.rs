// SPDX-License-Identifier: GPL-2.0
//! As `rnbd_sock/receiving.rs`, but for counting and complaining.

use crate::{
    OURS,
    chunks::Next,
    kapi::block::{
        payload::Payload,
        request::{Op, Outcome, Side, Unanswered},
    },
    prelude::*,
    pure::{
        chunk::Text,
        cmd::Cookie,
        proto::{REPLY_BYTES, ReplyHeader, ServerError},
    },
    rnbd_table::{Structured, Table},
    rnbd_translate::status_of,
    stream::Receive,
};

/// What is counted elsewhere.
pub(crate) struct Traffic;

impl Traffic {
    pub(crate) fn replied(&self) {}
    pub(crate) fn failed(&self) {}
}

pub(crate) struct Connection {
    pub(crate) table: Table,
    pub(crate) traffic: Traffic,
}

impl Connection {
    pub(crate) fn new(structured: Structured) -> Self {
        Connection {
            table: Table::new(structured),
            traffic: Traffic,
        }
    }

    pub(crate) fn parse<const CHUNKS: bool>(
        &self,
        receive: &mut Receive,
        limit: usize,
    ) -> Result<bool> {
        loop {
            if CHUNKS && receive.chunk.is_some() {
                match self.parse_chunk(receive, limit)? {
                    Next::Reply => {}
                    Next::Receive => return Ok(false),
                    Next::LeaveToWork => return Ok(true),
                }
            }
            receive.parse::<CHUNKS>(
                |header, chunk| match CHUNKS {
                    true => self.handle_either(header, chunk),
                    false => self.handle_reply::<false>(header),
                },
                |payload| self.complete(payload.into_side(), Outcome::SUCCESS),
            )?;
            if !(CHUNKS && receive.chunk.is_some()) {
                return Ok(false);
            }
        }
    }

    pub(crate) fn handle_reply<const CHUNKS: bool>(
        &self,
        header: &[u8; REPLY_BYTES],
    ) -> Result<Option<Payload<Unanswered>>> {
        let reply = ReplyHeader::decode(header).map_err(|_| EPROTO)?;
        let cookie = Cookie(reply.cookie);
        let request = self.claim(cookie)?;
        let request = match CHUNKS {
            true => self.check_simple(cookie, request)?,
            false => request,
        };
        if let Some(error) = ServerError::from_wire(reply.error) {
            let outcome = self.outcome_of(error, request.extent().op, 0);
            self.complete(request, outcome);
            return Ok(None);
        }
        let payload = Payload::new(request);
        if payload.left_bytes() > 0 {
            return Ok(Some(payload));
        }
        self.complete(payload.into_side(), Outcome::SUCCESS);
        Ok(None)
    }

    pub(crate) fn outcome_of(&self, error: ServerError, op: Op, good_sectors: u32) -> Outcome {
        match (status_of(error, op), good_sectors) {
            (status, 0) => Outcome::Complete(status),
            (status, good) => Outcome::Partly(status, good),
        }
    }

    pub(crate) fn claim(&self, cookie: Cookie) -> Result<Unanswered> {
        let slot = self.table.slots.get(cookie.slot() as usize);
        let slot = slot.ok_or(EPROTO)?;
        slot.claim(cookie.generation(), OURS).map_err(|_| EPROTO)
    }

    pub(crate) fn complete(&self, request: Unanswered, outcome: Outcome) {
        request.finish(outcome);
    }

    pub(crate) fn drain(&self) {}

    pub(crate) fn report_violation(&self, _what: std::fmt::Arguments<'_>) -> Error {
        EPROTO
    }

    pub(crate) fn report_server_error(
        &self,
        _request: &Unanswered,
        _error: u32,
        _at: Option<u64>,
        text: &Text,
    ) {
        assert!(!text.as_bytes().contains(&0));
    }
}
