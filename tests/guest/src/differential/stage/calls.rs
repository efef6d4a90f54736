// SPDX-License-Identifier: GPL-2.0

//! The ioctls of a sequence, and how answers are written down.

use std::fs::File;

use crate::differential::operations::Request;
use crate::proto::{
    self, BLKDISCARD, BLKFLSBUF, BLKGETSIZE64, BLKROGET, BLKROSET, BLKRRPART, BLKSSZGET, BLKZEROOUT,
};
use crate::sys::{self, SysResult, ioctl_number, ioctl_pointer};

pub fn call(file: &File, request: Request) -> String {
    let (number, argument) = match request {
        Request::SetSockHuge(number) => (proto::SET_SOCK, number),
        Request::SetBlksize(bytes) => (proto::SET_BLKSIZE, bytes),
        Request::SetSize(bytes) => (proto::SET_SIZE, bytes),
        Request::SetSizeBlocks(blocks) => (proto::SET_SIZE_BLOCKS, blocks),
        Request::SetTimeout(seconds) => (proto::SET_TIMEOUT, seconds),
        Request::SetFlags(flags) => (proto::SET_FLAGS, flags),
        Request::ClearSock => (proto::CLEAR_SOCK, 0),
        Request::ClearQue => (proto::CLEAR_QUE, 0),
        Request::PrintDebug => (proto::PRINT_DEBUG, 0),
        Request::Disconnect => (proto::DISCONNECT, 0),
        Request::DoIt => (proto::DO_IT, 0),
        Request::FlushBuffers => (BLKFLSBUF, 0),
        Request::RereadPartitions => (BLKRRPART, 0),
        Request::Unknown(number) => (number, 0),
        Request::SetSock(_) => unreachable!("is given a socket first"),
        Request::GetSize64 => return got::<u64>(file, BLKGETSIZE64, 0),
        Request::GetReadOnly => return got::<i32>(file, BLKROGET, 0),
        Request::GetBlockSize => return got::<i32>(file, BLKSSZGET, 0),
        Request::SetReadOnly(value) => return got::<i32>(file, BLKROSET, value),
        Request::Discard(at, len) => return got::<[u64; 2]>(file, BLKDISCARD, [at, len]),
        Request::ZeroOut(at, len) => return got::<[u64; 2]>(file, BLKZEROOUT, [at, len]),
    };
    answered(ioctl_number(file, number, argument))
}

pub fn answered(answer: SysResult) -> String {
    format!("{answer:?}")
}

fn got<T: sys::Plain + std::fmt::Debug>(file: &File, request: u32, mut value: T) -> String {
    let answer = ioctl_pointer(file, request, &mut value);
    format!("{:?}", answer.map(|_| value))
}
