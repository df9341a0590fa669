"""Every metric of every service, in one file, so that names stay consistent and a dashboard's author reads one page.

Names are `hma_<role>_<name>_<unit>`; counters end in `_total`; times are seconds and sizes bytes. Each service is a
process of its own, so unused metrics of other roles are created only by the role's factory function.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry

REGISTRY = CollectorRegistry(auto_describe=True)
"""The process's registry; prometheus_client's global one is left to the embedding program."""
