// SPDX-License-Identifier: GPL-2.0

//! What a server stores.

use std::collections::BTreeMap;

/// Sparse storage of any size.
#[derive(Default)]
pub struct Store {
    chunks: BTreeMap<u64, Vec<u8>>,
}

const CHUNK: u64 = 64 << 10;

impl Store {
    pub fn read(&self, offset: u64, mut data: &mut [u8]) {
        let mut at = offset;
        while !data.is_empty() {
            let (skip, len) = within_chunk(at, data.len());
            let (part, rest) = data.split_at_mut(len);
            match self.chunks.get(&(at / CHUNK)) {
                Some(chunk) => part.copy_from_slice(&chunk[skip..skip + len]),
                None => part.fill(0),
            }
            data = rest;
            at += len as u64;
        }
    }

    pub fn write(&mut self, offset: u64, mut data: &[u8]) {
        let mut at = offset;
        while !data.is_empty() {
            let (skip, len) = within_chunk(at, data.len());
            let chunk = self
                .chunks
                .entry(at / CHUNK)
                .or_insert_with(|| vec![0; CHUNK as usize]);
            chunk[skip..skip + len].copy_from_slice(&data[..len]);
            data = &data[len..];
            at += len as u64;
        }
    }

    pub fn zero(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        for (index, chunk) in self.chunks.range_mut(offset / CHUNK..end.div_ceil(CHUNK)) {
            let start = index * CHUNK;
            let from = offset.saturating_sub(start);
            let to = (end - start).min(CHUNK);
            chunk[from as usize..to as usize].fill(0);
        }
    }
}

fn within_chunk(at: u64, len: usize) -> (usize, usize) {
    let skip = (at % CHUNK) as usize;
    (skip, len.min(CHUNK as usize - skip))
}
