"""Links of a cluster that hold each packet for a while: what netem does, where the kernel has none.

    python3 tests/cluster_delay.py SECONDS PID …

makes the interface of each node, given by a process in its network, and the port that joins it to the bridge in the
network of this process; packets pass from one to the other through here. It prints a line when all are there, and the
interfaces go with it.
"""

import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque

from elsewhere.tests.cluster import INTERFACE

TUNSETIFF, TUNSETOFFLOAD = 0x400454CA, 0x400454D0
TAP, NO_PACKET_INFORMATION, OFFLOAD_HEADER = 0x0002, 0x1000, 0x4000
CHECKSUMS, SEGMENTS = 0x01, 0x02  # packets that the sender's kernel left to its card travel as they are
LARGEST = 1 << 17


def interface(name: str) -> int:
    """A new Ethernet interface in the current network, as a file of its packets."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = TAP | NO_PACKET_INFORMATION | OFFLOAD_HEADER
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    fcntl.ioctl(file, TUNSETOFFLOAD, CHECKSUMS | SEGMENTS)
    return file


def enter(network: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(network, 0):
        raise OSError(ctypes.get_errno(), "setns")


def relay(pairs: list[tuple[int, int]], seconds: float) -> None:
    """Pass packets from the first of each pair to the second `seconds` late, and back at once; for ever."""
    ports, nodes = dict(pairs), {port: node for node, port in pairs}
    waiting: deque[tuple[float, int, bytes]] = deque()  # in the order of arrival, which is that of departure
    while True:
        rest = max(waiting[0][0] - time.monotonic(), 0.0) if waiting else None
        for file in select.select([*ports, *nodes], [], [], rest)[0]:
            packet = os.read(file, LARGEST)
            if file in ports:
                waiting.append((time.monotonic() + seconds, ports[file], packet))
            else:
                pass_on(nodes[file], packet)
        while waiting and waiting[0][0] <= time.monotonic():
            _, port, packet = waiting.popleft()
            pass_on(port, packet)


def pass_on(file: int, packet: bytes) -> None:
    try:
        os.write(file, packet)
    except OSError:  # the interface is down: the packet is lost
        return


def main() -> None:
    seconds, pids = float(sys.argv[1]), sys.argv[2:]
    here = os.open("/proc/self/ns/net", os.O_RDONLY)
    pairs = []
    for number, pid in enumerate(pids):
        port = interface(f"port{number}")
        enter(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY))
        pairs.append((interface(INTERFACE), port))
        enter(here)
    print("ready", flush=True)
    relay(pairs, seconds)


if __name__ == "__main__":
    main()
