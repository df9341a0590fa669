"""Logging of a service: readable lines by default, one JSON object a line on request; always on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class HumanFormatter(logging.Formatter):
    """`22:14:03.120 router  WARNING message key=value`."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """One line, or several with a traceback."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        extras = "".join(f" {key}={value}" for key, value in _extras(record).items())
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        line = f"{clock}.{int(record.msecs):03d} {self._role:8s}{level}{record.getMessage()}{extras}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One object a line: time (RFC 3339, UTC), level, role, logger, message and whatever `extra` holds."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "role": self._role,
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str, ensure_ascii=False)


def _of_a_client_that_is_there(record: logging.LogRecord) -> bool:
    """False for what grpcio logs, with a traceback, when a client was gone before its status could be sent."""
    return not str(record.msg).startswith("ExecuteBatchError raised in core by servicer method")


def setup_logging(role: str, log_format: str = "human", level: str = "INFO") -> None:
    """Configures the root logger of this process; call once, first.

    Args:
        role: Named on every line.
        log_format: `human` or `json`.
        level: A level of `logging`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(role) if log_format == "json" else HumanFormatter(role))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # One line per health probe or scrape would bury everything else.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("grpc._cython.cygrpc").addFilter(_of_a_client_that_is_there)
