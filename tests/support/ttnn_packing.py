"""Packs arrays with ttnn on the host, in a Python that has it; a program: ttnn_packing.py HOST_MODULE IN.npz OUT.npz.

ttnn looks for a cluster before it packs anything, so it is shown the description of one card.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile

import numpy as np

CARD = """arch: {0: blackhole}
chips: {}
chip_unique_ids: {0: 0x41000000001}
ethernet_connections: []
ethernet_connections_to_remote_devices: []
chips_with_mmio:
  - 0: 0
harvesting:
  0: {noc_translation: true, harvest_mask: 0, dram_harvesting_mask: 0, eth_harvesting_mask: 288,
      pcie_harvesting_mask: 2, l2cpu_harvesting_mask: 0}
boards:
  -
    - board_id: 0x41000000001  # the upper half says p150
    - board_type: p150
    - chips:
        - 0
"""


def main(module: str, source: str, target: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as card:
        card.write(CARD)
        card.flush()
        os.environ["TT_METAL_MOCK_CLUSTER_DESC_PATH"] = card.name
        os.environ.setdefault("TT_LOGGER_LEVEL", "FATAL")
        import ttnn

        spec = importlib.util.spec_from_file_location("tenstorrent_host", module)
        assert spec is not None
        assert spec.loader is not None
        host = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(host)
        found = {}
        with np.load(source) as arrays:
            for name, values in arrays.items():
                tiles = host.to_tiles(values, ttnn.bfloat8_b)
                found[f"{name}_bytes"] = host.group_bytes(tiles, values.shape)
                found[f"{name}_values"] = tiles.to_numpy()
        np.savez(target, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
