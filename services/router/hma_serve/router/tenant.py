"""Whose a request is: named by a gateway that has checked it, in a header that the operator says may be trusted.

The name salts prefix caches and shares room fairly, so it is never taken from what a client can set by itself: without
a configured header everyone is one tenant.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from hma_serve.core.errors import InvalidArgument

_NAME = re.compile(r"[ -~]{1,128}", re.ASCII)


@dataclass(frozen=True, slots=True)
class TenantHeader:
    """Where the tenant's name stands.

    Attributes:
        name: Of the HTTP header or gRPC metadata key, in lower case; empty: nowhere.
    """

    name: str = ""

    def read(self, header: Callable[[str], str | None]) -> str:
        """The tenant of a request; empty for everyone who is not named.

        Args:
            header: Looks up one of the request's headers.

        Raises:
            InvalidArgument: The name is not up to 128 printable ASCII characters.
        """
        value = header(self.name) if self.name else None
        if not value:
            return ""
        if not _NAME.fullmatch(value):
            raise InvalidArgument(f"{self.name} must be up to 128 printable ASCII characters", field=self.name)
        return value
