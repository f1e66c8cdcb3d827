"""Addresses of this machine: at which of them ranks listen, so that the other ranks reach them and nobody else does.

A socket at all addresses is open to every network that the machine is in. Ranks need one, which leads to the others.
"""

from __future__ import annotations

import array
import fcntl
import ipaddress
import os
import socket
import struct
from pathlib import Path

from distquant.errors import InputError

LOOPBACK = "127.0.0.1"

GLOO, NCCL = NAMED = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables that name the network interface on which ranks listen."""

LIST_ADDRESSES = 0x8912
"""Linux's SIOCGIFCONF: fills an array with the IPv4 addresses of all interfaces."""

ENTRY = struct.Struct("16s4x4s16x")
"""An entry of that array (`struct ifreq` on 64 bits): name and IPv4 address."""

ADDRESSES = 1024
"""Entries that the array has room for."""

IPV6 = Path("/proc/net/if_inet6")
"""Linux's list of IPv6 addresses: the address in hex first, the interface's name last."""


def interfaces() -> dict[str, list[str]]:
    """Returns the addresses of each network interface that has any, IPv4 first."""
    found: dict[str, list[str]] = {}
    space = array.array("B", bytes(ENTRY.size * ADDRESSES))
    start, size = space.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        answer = fcntl.ioctl(any_socket, LIST_ADDRESSES, struct.pack("iP", size, start))
    (filled, _) = struct.unpack("iP", answer)
    for name, address in ENTRY.iter_unpack(space.tobytes()[:filled]):
        found.setdefault(name.partition(b"\0")[0].decode(), []).append(socket.inet_ntoa(address))
    for line in IPV6.read_text().splitlines() if IPV6.exists() else ():
        digits, *_, name = line.split()
        found.setdefault(name, []).append(str(ipaddress.IPv6Address(int(digits, 16))))
    return found


def interface_of(address: str) -> str | None:
    """Returns the name of the interface that has this address; None: this machine does not have it."""
    if is_loopback(address):
        address = next(iter(interfaces().get("lo", ())), address)  # any of 127.0.0.0/8 is the same machine
    return next((name for name, addresses in interfaces().items() if address in addresses), None)


def address_of(interface: str, where: str = "interface") -> str:
    """Returns the first address of an interface, which an option or a variable (`where`) has named.

    Raises:
        InputError: this machine has no interface of this name, or it has no address.
    """
    known = interfaces()
    if interface not in known:
        fault = f"{interface!r} is not a network interface with an address on {socket.gethostname()}"
        raise InputError.one(where, fault, f"Give one that every rank's machine has; here: {', '.join(known)}")
    return known[interface][0]


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def facing(host: str) -> str:
    """Returns the address of this machine by which it reaches `host`, and `host` reaches it. Nothing is sent.

    Raises:
        OSError: the name is not known, or no route leads there.
    """
    family, *_, there = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(there)  # chooses a route
        return str(probe.getsockname()[0])


def all_here() -> bool | None:
    """Returns True if all ranks are on this machine, False if some are elsewhere, None if the launcher does not say."""
    world = os.environ["WORLD_SIZE"]
    here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    if here is not None:
        return here == world
    if os.environ.get("SLURM_STEP_NUM_TASKS") == world:  # each task is a rank
        return os.environ.get("SLURM_STEP_NUM_NODES") == "1"
    return None


def name_interface(name: str) -> None:
    """Makes the ranks of this process, and of those that it starts, listen on this interface."""
    for variable in NAMED:
        os.environ[variable] = name


def stay_on_this_machine() -> None:
    """Makes the ranks of this process, and of those that it starts, listen on the loopback interface only.

    An interface that the user has named is kept.
    """
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
    for variable in NAMED if name is not None else ():
        os.environ.setdefault(variable, str(name))


def face(host: str) -> None:
    """Makes gloo listen on the interface that leads to `host`, the machine of rank 0, unless the user has named one.

    gloo's own choice is the address of this machine's name, often one that no other machine reaches. NCCL looks for an
    interface itself, may use several, and does not listen elsewhere.
    """
    try:
        name = interface_of(facing(host))
    except OSError:  # joining there will say more
        return
    if name is not None:
        os.environ.setdefault(GLOO, name)


def place_ranks(interface: str | None, host: str, alone: bool | None = None) -> str:
    """Chooses the interface that the ranks of this process listen on; returns the address at which they meet.

    Args:
        interface: its name, if the user has given it.
        host: name or address of rank 0's machine, as the launcher gave it.
        alone: True if all ranks are on this machine, False if some are elsewhere, None: as far as variables say.

    Raises:
        InputError: there is no such interface.
    """
    if interface is not None:
        name_interface(interface)
        own = address_of(interface)
        return own if _on_loopback(host) else host
    for name in filter(None, os.environ.get(GLOO, "").split(",")):
        address_of(name, GLOO)
    here = all_here() if alone is None else alone
    if here:
        stay_on_this_machine()
    elif here is None or not _on_loopback(host):
        face(host)
    return host


def check_reached(place: str, host: str) -> None:
    """Checks that ranks elsewhere can reach the address at which ranks are to meet.

    Raises:
        InputError: it is one that every machine calls its own, and ranks on other machines wait for rank 0.
    """
    if all_here() is False and _on_loopback(place):
        fault = f"{host!r} is this machine alone (loopback), and some ranks are on others"
        fix = "Set it to rank 0's address in the network of all, or name the network interface (interface, --interface)"
        raise InputError.one("MASTER_ADDR", fault, fix)


def own(place: str, interface: str | None) -> str:
    """Returns the address at which rank 0 listens so that ranks who go to `place` find it.

    That is `place`, unless this machine is known by another address outside (a service, a translated address).
    """
    address = str(socket.getaddrinfo(place, 1, type=socket.SOCK_STREAM)[0][-1][0])
    if interface_of(address) is not None:
        return address
    return facing(place) if interface is None else address_of(interface)


def _on_loopback(host: str) -> bool:
    try:
        return is_loopback(facing(host))
    except OSError:
        return False
