#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
#
# kapi/probe.sh SRCTREE OBJTREE: prints what the kernel that lies there lacks of the features that kapi takes
# from the newest kernel that it builds for. Kbuild runs this: each becomes a cfg, rnbd_lacks_NAME.
#
# Names of the crate are looked up in its metadata, which each tree has that a module can be built for, and
# names of other declarations in the headers.

srctree=$1 objtree=$2

has_name() { LC_ALL=C grep -aqw "$1" "$objtree/rust/libbindings.rmeta"; }

in_header() { grep -qsw "$2" "$srctree/include/$1"; }

unknown() {
	echo "rnbd: this kernel is not one that rnbd builds for (it lacks $*): see Documentation/kernels.rst" >&2
	exit 1
}

[ -r "$objtree/rust/libbindings.rmeta" ] || unknown rust/libbindings.rmeta
# Generic netlink is in the crate as a whole, or not at all.
has_name genlmsg_new || echo genetlink
if in_header linux/bvec.h bi_offset; then
	:
elif in_header linux/bvec.h bi_bvec_done; then
	echo bi_offset
else
	unknown 'the position in struct bvec_iter'
fi
