"""The interface of the pinned Unsloth, on a CPU: what we call exists and means what we think. Needs the full kit."""
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECK = """
import unsloth  # first: it patches the others
import torch
from unsloth.utils.prefix_grouper_kernel import _make_mask_mod
from unsloth.models.llama import LlamaModel_fast_forward
import distjudge

lists = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 3, 5, 6], [1, 9], [8], [8, 1]]
for chosen in ([0, 1, 2], [0, 1, 2, 3, 4, 5], [4]):
    pack = distjudge.build_pack(lists, chosen, two_levels=True)
    ends, positions = torch.tensor(pack.ends), torch.tensor(pack.positions)
    seg = distjudge.unsloth_segments(ends, positions)
    at = torch.arange(len(pack.ids))
    theirs = _make_mask_mod(seg.group_of_kv, seg.is_prefix, seg.suffix_of_kv)(None, None, at[:, None], at[None, :])
    ours = (at[None, :] <= at[:, None]) & (at[:, None] < ends[None, :])
    assert seg.T == len(pack.ids) and torch.equal(theirs, ours), (theirs, ours)
assert LlamaModel_fast_forward.__module__ == "unsloth.models.llama"
print("the masks agree")
"""


@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="needs the full kit: pip install -r requirements.txt")
def test_unsloth_groups_make_our_mask(tmp_path):
    environment = os.environ | {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "UNSLOTH_COMPILE_LOCATION": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and "the masks agree" in done.stdout, done.stderr[-3000:]
