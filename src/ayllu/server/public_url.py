"""Which URLs may be fetched for a stranger: one strict parser, and which IP addresses are public.

Two parsers that read one URL differently, or an address written in a way that only the resolver understands,
lead a server where it should not go. So what is not plain is refused, and nothing is repaired.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

MAX_URL_CHARACTERS = 2048

_URL = re.compile(
    r"(?P<scheme>https?)://(?:\[(?P<ipv6>[0-9a-f:.]+)\]|(?P<host>[a-z0-9._-]+))(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>[/?][!-~]*)?",
    re.IGNORECASE | re.ASCII,
)
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE | re.ASCII)
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+", re.IGNORECASE | re.ASCII)
# Unicast IPv6 that is given out is all in one block. The others have purposes of their own: IANA's registries
# of special-purpose addresses, and multicast.
_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_SPECIAL = tuple(
    map(ipaddress.ip_network, (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12",
        "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24",
        "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/3", "2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20",
    ))
)  # fmt: skip


class RefusedUrl(Exception):
    """Why a URL is not fetched, in words that may be shown: no address, no path."""


@dataclass(frozen=True)
class Address:
    """An http or https URL, understood. `host` is a name or an IP address without brackets; target: path and
    query as they are sent."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def netloc(self) -> str:
        """As the Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        usual = {"http": 80, "https": 443}[self.scheme]
        return host if self.port == usual else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.target}"


def parse_url(url: str) -> Address:
    """An absolute http or https URL of printable ASCII, without user, fragment, zone or odd spellings of IP
    addresses. Raises RefusedUrl."""
    url = url.partition("#")[0]
    found = _URL.fullmatch(url) if len(url) <= MAX_URL_CHARACTERS and "\\" not in url else None
    if found is None:
        raise RefusedUrl("is no plain http or https URL")
    scheme = found["scheme"].lower()
    port = int(found["port"] or {"http": 80, "https": 443}[scheme])
    target = found["target"] or "/"
    if not 1 <= port <= 65535:
        raise RefusedUrl("has a port that does not exist")
    return Address(scheme, _host(found), port, target if target.startswith("/") else f"/{target}")


def _host(found: re.Match[str]) -> str:
    try:
        if found["ipv6"] is not None:
            return str(ipaddress.IPv6Address(found["ipv6"]))
        host = found["host"].lower()
        labels = host.split(".")
        # Resolvers read 127.1, 0x7f000001 and 017700000001 as addresses; here those are four numbers or none.
        if _NUMBER.fullmatch(labels[-1]):
            return str(ipaddress.IPv4Address(host))
    except ValueError as error:
        raise RefusedUrl("has a host that is neither a name nor a plain IP address") from error
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)):
        raise RefusedUrl("has a host that is neither a name nor a plain IP address")
    return host


def is_public(address: str) -> bool:
    """Whether an IP address is unicast, given out, and reached over the internet. Forms that carry an IPv4
    address (mapped, NAT64) are what that one is; 6to4 and Teredo are not."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None:
            return False
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _UNICAST:
            return False
    inside = any(ip.version == block.version and ip in block for block in _SPECIAL)
    return not inside and ip.is_global and not ip.is_multicast
