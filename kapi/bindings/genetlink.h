/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Generic netlink, as kapi/bindings.h, for kernels whose crate lacks it: that of 7.2 does. Types that the
 * others only point to are opaque (kapi/bindings/genetlink.rs).
 */

#include <net/genetlink.h>

//bindgen: --allowlist-type nla_policy
//bindgen: --allowlist-type nla_policy__bindgen.*
//bindgen: --allowlist-type genl_family
//bindgen: --allowlist-type genl_info
//bindgen: --allowlist-type genl_info__bindgen.*
//bindgen: --allowlist-type genl_multicast_group
//bindgen: --allowlist-type genl_small_ops
//bindgen: --allowlist-type genl_validate_flags
//bindgen: --allowlist-type genlmsghdr
//bindgen: --allowlist-function genl_register_family
//bindgen: --allowlist-function genl_unregister_family
//bindgen: --allowlist-function genlmsg_put
//bindgen: --allowlist-function nla_append
//bindgen: --allowlist-function nla_put
//bindgen: --allowlist-var NLA_.*
//bindgen: --allowlist-var genl_validate_flags.*
