#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Reconnect a network block device whenever one of its connections dies.

The device must have been connected over netlink ("nbd-client" without -L). The program waits
until the kernel reports a dead connection (NBD_CMD_LINK_DEAD), connects to the server again, and
passes the new socket to the kernel (NBD_CMD_RECONFIGURE). It works with nbd.ko and with rnbd. It
needs CAP_SYS_ADMIN and runs in the initial network namespace.

It cannot know whether the server has lost what it had acknowledged. Use it only with a server
that has not: see "The server was restarted" in admin-guide.rst. It is an example, and knows no TLS.
"""

import argparse
import errno
import os
import re
import socket
import struct
import sys
import time

# linux/nbd-netlink.h
RECONFIGURE, LINK_DEAD = 3, 4
INDEX, TIMEOUT, SOCKETS, DEAD_CONN_TIMEOUT, BACKEND_IDENTIFIER = 1, 4, 7, 8, 10
SOCK_ITEM, SOCK_FD = 1, 1

# linux/netlink.h and linux/genetlink.h
NETLINK_GENERIC, SOL_NETLINK = 16, 270
NETLINK_ADD_MEMBERSHIP, NETLINK_EXT_ACK = 1, 11
NLM_F_REQUEST, NLM_F_ACK, NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x1, 0x4, 0x100, 0x200
NLMSG_ERROR, NLMSGERR_ATTR_MSG = 2, 1
GENL_ID_CTRL, CTRL_CMD_GETFAMILY = 16, 3
CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME, CTRL_ATTR_MCAST_GROUPS = 1, 2, 7
CTRL_ATTR_MCAST_GRP_NAME, CTRL_ATTR_MCAST_GRP_ID = 1, 2


def attribute(kind, value):
    size = 4 + len(value)
    return struct.pack("=HH", size, kind) + value + bytes(-size % 4)


def attributes(data):
    found = {}
    while len(data) >= 4:
        size, kind = struct.unpack_from("=HH", data)
        if size < 4:
            break
        found[kind & 0x3FFF] = data[4:size]
        data = data[(size + 3) & ~3:]
    return found


class Netlink:
    """A generic netlink socket, and the numbers of the family "nbd"."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_GENERIC)
        self.socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        name = attribute(CTRL_ATTR_FAMILY_NAME, b"nbd\0")
        family = self.ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, name)
        self.family = struct.unpack("=H", family[CTRL_ATTR_FAMILY_ID])[0]
        self.groups = {}
        for group in attributes(family[CTRL_ATTR_MCAST_GROUPS]).values():
            group = attributes(group)
            name = group[CTRL_ATTR_MCAST_GRP_NAME].rstrip(b"\0").decode()
            self.groups[name] = struct.unpack("=I", group[CTRL_ATTR_MCAST_GRP_ID])[0]

    def ask(self, family, command, payload):
        """Sends a command. Returns the attributes of the answer, if there are any."""
        body = struct.pack("=BBH", command, 1, 0) + payload
        flags = NLM_F_REQUEST | NLM_F_ACK
        self.socket.send(struct.pack("=IHHII", 16 + len(body), family, flags, 0, 0) + body)
        answer = {}
        while True:
            message = self.socket.recv(65536)
            size, kind, flags = struct.unpack_from("=IHH", message)
            if kind != NLMSG_ERROR:
                answer = attributes(message[20:size])
                continue
            code = -struct.unpack_from("=i", message, 16)[0]
            if code == 0:
                return answer
            text = os.strerror(code)
            if flags & NLM_F_ACK_TLVS:
                # The request is repeated here: all of it, or only its header.
                request = 16 if flags & NLM_F_CAPPED else struct.unpack_from("=I", message, 20)[0]
                more = attributes(message[20 + request:])
                text += ": " + more.get(NLMSGERR_ATTR_MSG, b"").rstrip(b"\0").decode()
            raise OSError(code, text)

    def listen(self):
        """Receives the multicasts of the driver from now on."""
        group = self.groups["nbd_mc_group"]
        self.socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)

    def dead_link(self):
        """Waits for a multicast. Returns a device's index, or None if one may have been lost."""
        try:
            message = self.socket.recv(65536)
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return None
            raise
        if message[16] != LINK_DEAD:
            return None
        return struct.unpack("=I", attributes(message[20:])[INDEX])[0]


def receive(server, size):
    data = b""
    while len(data) < size:
        more = server.recv(size - len(data))
        if not more:
            raise ConnectionError("the server has closed the connection")
        data += more
    return data


def dial(address, export):
    """Connects to a server and negotiates. Returns the socket and the size of the export."""
    if address.startswith("/"):
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        server.settimeout(10)
        server.connect(address)
    else:
        host, _, port = address.rpartition(":")
        server = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # An idle connection to a dead peer ends within two minutes.
        server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10)
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
    magic, version, flags = struct.unpack(">8s8sH", receive(server, 18))
    if magic != b"NBDMAGIC" or version != b"IHAVEOPT" or not flags & 1:
        raise ConnectionError("the server does not speak the fixed newstyle protocol")
    name = export.encode()
    option = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    # NBD_FLAG_C_FIXED_NEWSTYLE, and NBD_OPT_GO.
    server.sendall(struct.pack(">I8sII", 1, b"IHAVEOPT", 7, len(option)) + option)
    size = None
    while True:
        _, _, kind, length = struct.unpack(">QIII", receive(server, 20))
        data = receive(server, length)
        if kind & 1 << 31:
            raise ConnectionError("the server refuses the export: " + data.decode(errors="replace"))
        if kind == 1:
            server.settimeout(None)
            return server, size
        if kind == 3 and data[:2] == b"\0\0":
            size = struct.unpack_from(">Q", data, 2)[0]


class Device:
    def __init__(self, path):
        self.name = os.path.basename(path)
        self.index = int(re.fullmatch(r"nbd(\d+)", self.name)[1])

    def read(self, name):
        with open(f"/sys/block/{self.name}/{name}") as file:
            return file.read().strip()

    def read_number(self, name):
        return int(self.read(name))

    def dead_connections(self):
        """The number of dead connections, which only rnbd shows, in debugfs."""
        # The file comes soon after the device was connected.
        for _ in range(20 if os.path.exists("/sys/module/rnbd") else 1):
            try:
                with open(f"/sys/kernel/debug/nbd/{self.name}/connections") as file:
                    return sum("state=dead" in line for line in file)
            except OSError:
                time.sleep(0.05)
        return 0

    def reconfigure(self, netlink, changes):
        payload = attribute(INDEX, struct.pack("=I", self.index)) + changes
        backend = self.read("backend")
        if backend:
            payload += attribute(BACKEND_IDENTIFIER, backend.encode() + b"\0")
        netlink.ask(netlink.family, RECONFIGURE, payload)


def reconnect(netlink, device, options):
    """Replaces a dead connection. Tries until the server answers."""
    while True:
        try:
            server, size = dial(options.server, options.export)
            break
        except OSError as error:
            print(f"{options.server}: {error}", file=sys.stderr, flush=True)
            time.sleep(1)
    with server:
        if size // 512 != device.read_number("size"):
            sys.exit(f"{options.server}: the export has {size} bytes: is it another image?")
        fd = attribute(SOCK_FD, struct.pack("=I", server.fileno()))
        device.reconfigure(netlink, attribute(SOCKETS, attribute(SOCK_ITEM, fd)))
    print(f"{device.name}: gave the kernel a new connection to {options.server}", flush=True)


def seconds(kind, value):
    return b"" if value is None else attribute(kind, struct.pack("=Q", value))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("device", help="such as /dev/nbd0")
    parser.add_argument("server", help="HOST:PORT, or the path of a UNIX socket")
    parser.add_argument("--export", default="", metavar="NAME")
    parser.add_argument("--dead-conn-timeout", type=int, metavar="SECONDS",
                        help="set for how long requests wait for a new connection")
    parser.add_argument("--timeout", type=int, metavar="SECONDS",
                        help="set the timeout of the device")
    parser.add_argument("--once", action="store_true",
                        help="only reconnect what is dead now (as debugfs shows it)")
    options = parser.parse_args()
    netlink, news, device = Netlink(), Netlink(), Device(options.device)
    news.listen()
    changes = seconds(TIMEOUT, options.timeout)
    changes += seconds(DEAD_CONN_TIMEOUT, options.dead_conn_timeout)
    device.reconfigure(netlink, changes)
    for _ in range(device.dead_connections()):
        reconnect(netlink, device, options)
    if options.once:
        return
    print(f"{device.name}: waiting for connections to die", flush=True)
    while True:
        index = news.dead_link()
        for _ in range(device.dead_connections() if index is None else index == device.index):
            reconnect(netlink, device, options)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(f"nbd-reconnect: {error}")
    except KeyboardInterrupt:
        pass
