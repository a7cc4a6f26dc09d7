"""What a process that computes without torch's compiler can do, and what becomes of one that cannot do without it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import json, os, sys
from agentd.nn.import_stubs import FULL_IMPORTS, import_lean

if "refused" in sys.argv and FULL_IMPORTS not in os.environ:
    sys.modules["torch._prims.rng_prims"] = None  # as if it had gone to another place
import_lean("program", meta_device="meta" in sys.argv)

import torch
from torch.utils.checkpoint import checkpoint

x = torch.ones(3, requires_grad=True)
checkpoint(lambda x: (x * x).sum(), x, use_reentrant=False).backward()
optimiser = torch.optim.AdamW([x])
optimiser.step()
answer = {
    "arguments": sys.argv[1:],
    "compiler": "torch._inductor.utils" in sys.modules or "torch._dynamo.eval_frame" in sys.modules,
    "slope": x.grad.tolist(),
    "moved": bool((x < 1).all()),
}
if "meta" in sys.argv:
    answer["meta"] = list(torch.linalg.qr(torch.empty(4, 3, device="meta"))[0].shape)
print(json.dumps(answer))
"""


def run(folder: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """What the program says, and what it complains of."""
    (folder / "program.py").write_text(PROGRAM)
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[3])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "program", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_gradients_need_no_compiler(tmp_path: Path) -> None:
    answer, complaint = run(tmp_path, "meta")
    expected = {"arguments": ["meta"], "compiler": False, "slope": [2.0, 2.0, 2.0], "moved": True, "meta": [4, 3]}
    assert (answer, complaint) == (expected, "")


def test_a_torch_that_cannot_do_without_gets_all_of_it(tmp_path: Path) -> None:
    answer, complaint = run(tmp_path, "refused")
    assert answer == {"arguments": ["refused"], "compiler": True, "slope": [2.0, 2.0, 2.0], "moved": True}
    assert "starting again with full ones" in complaint
