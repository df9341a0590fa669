"""Channels with the same limits and keepalive on every link."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

import grpc.aio

from hma_serve.rpc.tls import SERVICE_NAME, Stamp, TlsConfig

MAX_MESSAGE_BYTES = 2 << 20
"""Largest message of a KV stream, header and payload (docs/kv-block-format.md)."""

# A little above the KV limit: prompts of the largest windows fit as well, and nothing is ever unlimited.
_RECEIVE_LIMIT = MAX_MESSAGE_BYTES + (1 << 20)

COMMON_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", _RECEIVE_LIMIT),
    ("grpc.max_send_message_length", _RECEIVE_LIMIT),
    ("grpc.http2.max_frame_size", 16777215),
    # A stopped or vanished peer is noticed within seconds, also on an idle connection.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 4_000),
    # Pings that measure bandwidth stand in for those of keepalive, with a limit of their own (a minute by default).
    ("grpc.http2.ping_timeout_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Retries are decided by the caller, who knows whether a token was sent.
    ("grpc.enable_retries", 0),
]

_CLIENT_OPTIONS: list[tuple[str, Any]] = [
    *COMMON_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    # gRPC takes this for the least time that a connection attempt gets.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Workers are addressed one by one; a proxy from the environment would only be in the way.
    ("grpc.enable_http_proxy", 0),
    # Two channels to one address are two connections.
    ("grpc.use_local_subchannel_pool", 1),
]


def open_channel(address: str, *, tls: TlsConfig | None = None) -> grpc.aio.Channel:
    """Opens a channel to `host:port`; it connects on first use."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options=_CLIENT_OPTIONS)
    named = [*_CLIENT_OPTIONS, ("grpc.ssl_target_name_override", SERVICE_NAME)]
    return grpc.aio.secure_channel(address, tls.channel_credentials(), options=named)


_Key = tuple[str, Stamp]


class ChannelCache:
    """One channel per address, the least recently used closed beyond `limit`; confined to one event loop.

    A channel in use is never closed: take it with `lease` and give it back. When the certificates are replaced, new
    uses get new channels, and the old ones end with their last use.
    """

    def __init__(self, *, limit: int = 256, tls: TlsConfig | None = None) -> None:
        self._limit = limit
        self._tls = tls
        self._stamp: Stamp = () if tls is None else tls.stamp()
        self._channels: OrderedDict[_Key, grpc.aio.Channel] = OrderedDict()
        self._users: dict[_Key, int] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def lease(self, address: str) -> _Lease:
        """A context manager that yields the channel and counts as its user."""
        return _Lease(self, address)

    def take(self, address: str) -> tuple[_Key, grpc.aio.Channel]:
        """The channel to `address`, opened if need be, and its key; pair with `give_back`."""
        if self._tls is not None:
            # Between two files of a replacement there is no stamp, and the old channels serve on.
            self._stamp = self._tls.stamp() or self._stamp
        key = (address, self._stamp)
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = open_channel(address, tls=self._tls)
        self._channels.move_to_end(key)
        self._users[key] = self._users.get(key, 0) + 1
        self._evict()
        return key, channel

    def give_back(self, key: _Key) -> None:
        """Ends one use of the channel."""
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
        self._evict()

    async def close(self) -> None:
        """Closes every channel; calls must have been cancelled and awaited before (grpc#42125)."""
        channels, self._channels = list(self._channels.values()), OrderedDict()
        await asyncio.gather(*(channel.close() for channel in channels), *self._closing)

    def _evict(self) -> None:
        idle = [key for key in self._channels if key not in self._users]
        outdated = [key for key in idle if key[1] != self._stamp]
        excess = max(0, len(self._channels) - len(outdated) - self._limit)
        for key in [*outdated, *[key for key in idle if key[1] == self._stamp][:excess]]:
            task = asyncio.ensure_future(self._channels.pop(key).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


class _Lease:
    """`with cache.lease(address) as channel:`."""

    def __init__(self, cache: ChannelCache, address: str) -> None:
        self._cache = cache
        self._address = address

    def __enter__(self) -> grpc.aio.Channel:
        self._key, channel = self._cache.take(self._address)
        return channel

    def __exit__(self, *exc: object) -> None:
        self._cache.give_back(self._key)
