/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The C declarations that kapi uses and that the bindings of the kernel crate (kernel::bindings) lack.
 *
 * Kbuild runs bindgen on this file. Each comment that starts with "bindgen:" holds one option for it.
 * The generated code takes all types that these options do not name from kernel::bindings.
 */

#include <linux/blkdev.h>
#include <linux/blk-mq.h>
#include <linux/in.h>
#include <linux/nbd.h>
#include <linux/nsproxy.h>
#include <net/af_vsock.h>
#include <net/genetlink.h>
#include <net/net_namespace.h>
#include <net/sock.h>
#include <net/tcp.h>
#include <net/tls.h>
#include <trace/events/nbd.h>
#include "../rnbd_trace.h"
#ifdef RNBD_LACKS_GENETLINK
#include "bindings/genetlink.h"
#endif

/* struct sock with its fields. The types that it only points to are opaque (kapi/bindings.rs). */
//bindgen: --allowlist-type sock
//bindgen: --allowlist-type sock__bindgen.*
//bindgen: --allowlist-type sock_common
//bindgen: --allowlist-type sock_common__bindgen.*
//bindgen: --allowlist-type socket_lock_t
//bindgen: --allowlist-type __addrpair
//bindgen: --allowlist-type __portpair
//bindgen: --allowlist-type possible_net_t
//bindgen: --allowlist-type netns_tracker
//bindgen: --allowlist-var memalloc_socks_key
//bindgen: --allowlist-function tcp_abort
//bindgen: --allowlist-function __put_net
//bindgen: --allowlist-function netlink_set_err
//bindgen: --allowlist-function lock_sock_nested
//bindgen: --allowlist-function release_sock
//bindgen: --allowlist-function sk_free
//bindgen: --allowlist-function tcp_read_sock
//bindgen: --allowlist-function tcp_sock_set_nodelay
//bindgen: --allowlist-function tcp_stream_memory_free

/* The trace events (rnbd_trace.c). */
//bindgen: --allowlist-var __tracepoint_nbd_.*
//bindgen: --allowlist-function rust_do_trace_nbd_.*

/* Macros with casts, which bindgen cannot evaluate. Kbuild strips the prefix from the names. */
#define RNBD_CONST(type, name) const type RNBD_CONST_##name = (__force type)name
RNBD_CONST(u8, BLK_STS_NOTSUPP);
RNBD_CONST(u8, BLK_STS_NOSPC);
RNBD_CONST(u8, BLK_STS_TARGET);
RNBD_CONST(u8, BLK_STS_IOERR);
RNBD_CONST(u8, BLK_STS_DEV_RESOURCE);
RNBD_CONST(u32, BLK_FEAT_WRITE_CACHE);
RNBD_CONST(u32, BLK_FEAT_FUA);
RNBD_CONST(u32, BLK_FLAG_WRITE_CACHE_DISABLED);
RNBD_CONST(u32, BLK_OPEN_READ);
RNBD_CONST(u32, BLK_OPEN_STRICT_SCAN);
RNBD_CONST(u32, RQF_DONTPREP);
RNBD_CONST(u32, GFP_NOIO);
RNBD_CONST(u32, __GFP_MEMALLOC);
/* For pages that are not needed: nothing is freed for them, and no task is woken up that does. */
#define GFP_FRAG (__GFP_COMP | __GFP_NOWARN | __GFP_NORETRY | __GFP_NOMEMALLOC)
RNBD_CONST(u32, GFP_FRAG);
RNBD_CONST(u32, EPOLLIN);
RNBD_CONST(u32, EPOLLOUT);
RNBD_CONST(u32, EPOLLERR);
RNBD_CONST(u32, EPOLLHUP);
RNBD_CONST(u32, EPOLLRDHUP);
RNBD_CONST(u32, RCV_SHUTDOWN);
RNBD_CONST(u32, SEND_SHUTDOWN);
RNBD_CONST(u32, SOCK_DEAD);
RNBD_CONST(u32, SOCK_NOSPACE);
RNBD_CONST(u32, SOCK_STREAM);
RNBD_CONST(u32, SOCK_MEMALLOC);
RNBD_CONST(u32, TCP_NODELAY);
RNBD_CONST(u32, TLS_GET_RECORD_TYPE);
RNBD_CONST(u8, TLS_SW);
RNBD_CONST(u8, TLS_HW);
RNBD_CONST(u8, TCP_ESTABLISHED);
RNBD_CONST(u8, TCP_SYN_SENT);
RNBD_CONST(u8, TCP_LISTEN);
RNBD_CONST(u8, TCP_CLOSE);
RNBD_CONST(size_t, SK_USER_DATA_NOCOPY);
RNBD_CONST(size_t, SK_USER_DATA_BPF);
RNBD_CONST(size_t, SK_USER_DATA_PSOCK);
RNBD_CONST(u32, IPPROTO_TCP);
RNBD_CONST(u32, IPPROTO_MPTCP);
RNBD_CONST(u32, HZ);
RNBD_CONST(u8, GENL_ADMIN_PERM);
RNBD_CONST(u32, SOFTIRQ_DISABLE_OFFSET);
RNBD_CONST(u32, HARDIRQ_MASK);

const size_t RNBD_CONST_NBD_REQUEST_BYTES = sizeof(struct nbd_request);

/* Offsets of fields of types that are not generated, as they depend on hundreds of other types. */
#define RNBD_OFFSET(type, field, name) const size_t RNBD_CONST_OFFSET_##name = offsetof(type, field)
RNBD_OFFSET(struct page, _refcount, PAGE_REFCOUNT);
RNBD_OFFSET(struct page, mapping, PAGE_MAPPING);
RNBD_OFFSET(struct sock, sk_flags, SK_FLAGS);
RNBD_OFFSET(struct sock, sk_lock.slock, SK_SLOCK);
RNBD_OFFSET(struct inet_connection_sock, icsk_ulp_ops, ULP_OPS);
RNBD_OFFSET(struct inet_connection_sock, icsk_ulp_data, ULP_DATA);
RNBD_OFFSET(struct net, genl_sock, GENL_SOCK);
RNBD_OFFSET(struct net, ns.__ns_ref, NET_REFERENCES);
RNBD_OFFSET(struct nsproxy, net_ns, NSPROXY_NET);
RNBD_OFFSET(struct genl_dumpit_info, info, DUMPIT_INFO);
RNBD_OFFSET(struct tcp_ulp_ops, name, ULP_NAME);
RNBD_OFFSET(struct tls_context, tx_lock, TLS_TX_LOCK);
/* The byte with the bit fields tx_conf and rx_conf. */
const size_t RNBD_CONST_OFFSET_TLS_CONF = offsetofend(struct tls_context, prot_info);
RNBD_OFFSET(struct vsock_sock, peer_shutdown, PEER_SHUTDOWN);
//bindgen: --allowlist-var RNBD_CONST_.*
