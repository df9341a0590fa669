"""How a service's `--help` says defaults: `(default: ...)` after the text, unless there is none or the text says it."""

from __future__ import annotations

import argparse


class DefaultsHelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """argparse's own says `(default: None)`, too, and repeats what an option's text explains in words."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, "") or "default:" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)
