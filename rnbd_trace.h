/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The trace events that nbd.ko does not have. They are in its trace system all the same.
 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM nbd
/* The kernel's own header has taken the name for itself. */
#undef TRACE_SYSTEM_VAR
#define TRACE_SYSTEM_VAR rnbd

#if !defined(_RNBD_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define _RNBD_TRACE_H

#include <linux/blk-mq.h>
#include <linux/tracepoint.h>

/* A request ends. Times are 0 if they are not known, and the connection is -1. */
TRACE_EVENT(nbd_request_done,

	TP_PROTO(struct request *rq, int connection, blk_status_t status,
		 u32 server_error, u64 queue_us, u64 wire_us),

	TP_ARGS(rq, connection, status, server_error, queue_us, wire_us),

	TP_STRUCT__entry(
		__array(char, disk, DISK_NAME_LEN)
		__array(char, op, 16)
		__field(int, connection)
		__field(u64, offset)
		__field(u32, length)
		__field(int, error)
		__field(u32, server_error)
		__field(u64, queue_us)
		__field(u64, wire_us)
	),

	TP_fast_assign(
		memset(__entry->disk, 0, sizeof(__entry->disk));
		memset(__entry->op, 0, sizeof(__entry->op));
		if (rq->q->disk)
			strscpy(__entry->disk, rq->q->disk->disk_name, sizeof(__entry->disk));
		strscpy(__entry->op, rnbd_op_name(rq), sizeof(__entry->op));
		__entry->connection = connection;
		__entry->offset = req_op(rq) == REQ_OP_FLUSH ? 0 : blk_rq_pos(rq) << SECTOR_SHIFT;
		__entry->length = blk_rq_bytes(rq);
		__entry->error = blk_status_to_errno(status);
		__entry->server_error = server_error;
		__entry->queue_us = queue_us;
		__entry->wire_us = wire_us;
	),

	TP_printk("%s: connection %d: %s of %u bytes at %llu, error %d, server error %u, queue %llu us, wire %llu us",
		__entry->disk, __entry->connection, __entry->op, __entry->length,
		__entry->offset, __entry->error, __entry->server_error,
		__entry->queue_us, __entry->wire_us)
);

/*
 * "reconnects" tells how often the connection at this place had been replaced before, as in the
 * family "rnbd".
 */

/* A socket was taken over. */
TRACE_EVENT(nbd_connection_born,

	TP_PROTO(int index, int connection, u32 reconnects),

	TP_ARGS(index, connection, reconnects),

	TP_STRUCT__entry(
		__array(char, disk, DISK_NAME_LEN)
		__field(int, connection)
		__field(u32, reconnects)
	),

	TP_fast_assign(
		memset(__entry->disk, 0, sizeof(__entry->disk));
		scnprintf(__entry->disk, sizeof(__entry->disk), "nbd%d", index);
		__entry->connection = connection;
		__entry->reconnects = reconnects;
	),

	TP_printk("%s: connection %d: born, reconnects %u",
		__entry->disk, __entry->connection, __entry->reconnects)
);

/* No request is sent on a connection any more, and its socket is about to be shut down. */
TRACE_EVENT(nbd_connection_dead,

	TP_PROTO(int index, int connection, u32 reconnects, const char *reason, int error),

	TP_ARGS(index, connection, reconnects, reason, error),

	TP_STRUCT__entry(
		__array(char, disk, DISK_NAME_LEN)
		__field(int, connection)
		__field(u32, reconnects)
		__array(char, reason, 24)
		__field(int, error)
	),

	TP_fast_assign(
		memset(__entry->disk, 0, sizeof(__entry->disk));
		memset(__entry->reason, 0, sizeof(__entry->reason));
		scnprintf(__entry->disk, sizeof(__entry->disk), "nbd%d", index);
		__entry->connection = connection;
		__entry->reconnects = reconnects;
		strscpy(__entry->reason, reason, sizeof(__entry->reason));
		__entry->error = error;
	),

	TP_printk("%s: connection %d: dead, reconnects %u, reason %s, error %d",
		__entry->disk, __entry->connection, __entry->reconnects,
		__entry->reason, __entry->error)
);

/* A connection has taken the place of another one. */
TRACE_EVENT(nbd_connection_replaced,

	TP_PROTO(int index, int connection, u32 reconnects, const char *by),

	TP_ARGS(index, connection, reconnects, by),

	TP_STRUCT__entry(
		__array(char, disk, DISK_NAME_LEN)
		__field(int, connection)
		__field(u32, reconnects)
		__array(char, by, 16)
	),

	TP_fast_assign(
		memset(__entry->disk, 0, sizeof(__entry->disk));
		memset(__entry->by, 0, sizeof(__entry->by));
		scnprintf(__entry->disk, sizeof(__entry->disk), "nbd%d", index);
		__entry->connection = connection;
		__entry->reconnects = reconnects;
		strscpy(__entry->by, by, sizeof(__entry->by));
	),

	TP_printk("%s: connection %d: replaced by %s, reconnects %u",
		__entry->disk, __entry->connection, __entry->by, __entry->reconnects)
);

#endif

/* This part must be outside protection. */
#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE rnbd_trace
#include <trace/define_trace.h>
