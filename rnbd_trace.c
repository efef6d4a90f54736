// SPDX-License-Identifier: GPL-2.0
/*
 * The trace events. kapi/trace.rs and kapi/block/timeline.rs call them.
 */

#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/nbd.h>

/* Those of nbd.ko, from the kernel's own header, so that they are the same. */
#define CREATE_TRACE_POINTS
#define CREATE_RUST_TRACE_POINTS
#include <trace/events/nbd.h>

/* The operation of a request, in the words of nbdcmd_to_ascii() in nbd.c. */
static const char __maybe_unused *rnbd_op_name(const struct request *rq)
{
	switch (req_op(rq)) {
	case REQ_OP_READ:
		return "read";
	case REQ_OP_WRITE:
		return "write";
	case REQ_OP_FLUSH:
		return "flush";
	case REQ_OP_DISCARD:
		return "trim/discard";
	case REQ_OP_WRITE_ZEROES:
		return "write-zeroes";
	default:
		return "invalid";
	}
}

#include "rnbd_trace.h"
