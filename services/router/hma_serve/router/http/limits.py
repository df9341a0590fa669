"""What one HTTP client may cost, in bytes, seconds and connections."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """The limits.

    Attributes:
        max_body_bytes: Largest body that is read.
        max_header_bytes: Longest request line, and longest header field.
        max_headers: Header fields of one request.
        max_connections: Connections at the same time; more are told to come back.
        body_timeout: Seconds in which a client must have sent its body.
        write_timeout: Seconds in which a client must take a piece of a stream, once the buffers are full.
        idle_timeout: Seconds in which a connection must bring its first request, or its next one, head and all.
    """

    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 8190
    max_headers: int = 128
    max_connections: int = 4096
    body_timeout: float = 30.0
    write_timeout: float = 60.0
    idle_timeout: float = 75.0
