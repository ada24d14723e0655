"""The kernels of tree attention compiled for Hopper, which needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton.experimental.gluon")

COMPILE = """
import json, re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from specdec.kernels import flash, hopper, merge

TYPES = {"Q": "*bf16", "OUT": "*bf16", "K": "*bf16", "V": "*bf16", "SINKS": "*bf16",
         "PART": "*fp16", "LSE": "*fp32", "STATES": "*fp32", "TABLE": "*i64", "COUNTER": "*i64",
         "scale": "fp32", "softcap": "fp32"}
MERGE = dict(DVP=128, BLOCK_M=64, MERGE_ROWS=1, MERGE_PIECES=8)
NARROW, WIDE = dict(BLOCK_M=64, BLOCK_N=64), dict(BLOCK_M=128, BLOCK_N=128)
SHAPE = dict(HQ=32, G=4, DV=128, HAS_SINKS=False, HAS_LSE=False, PDL=True)
READ = dict(DK=128, PAGE=64, W=2, CAUSAL=False, SOFTCAP=False, LOOSE_STEPS=2, STAGES=3)
TRITON = dict(
    DKP=128, DVP=128, WINDOW=0, BLOCK_M=64, BLOCK_N=64, LOOSE_N=32, LOOSE_STAGES=1, COUNT=False,
    SAME_TOKEN=True, BULK=True, BRING=True, NEAR=True,
)
layout = gl.NVMMASharedLayout.get_default_for([64, 128], gl.bfloat16)
tile, gluon_tile = "tensordesc<bf16[64, 128]>", f"tensordesc<bf16[64, 128],{layout!r}>"
VARIES = ("table_width", "rows", "fresh")  # not specialised


def compiled(kernel, source, constants, tile=None, **options):
    types = TYPES | {"K_TILES": tile, "V_TILES": tile}
    signature, values, aligned = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(place,)] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name, "*i32" if name.isupper() else "i32")
            if name not in VARIES and signature[name] not in (tile, "fp32"):
                aligned[(place,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        source(kernel, signature, values, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 1 if kernel is merge._merge_kernel else 4, **options},
    )
    first = [
        re.search(what, built.asm["ptx"]).start()
        for what in ("griddepcontrol.wait", "griddepcontrol.launch_dependents", "ld.global")
    ]
    return {"shared": built.metadata.shared, "in_order": first == sorted(first)}


print(json.dumps({
    "attention": compiled(flash._attend_kernel, ASTSource, SHAPE | READ | TRITON, tile),
    "merge": compiled(merge._merge_kernel, ASTSource, SHAPE | MERGE),
    "merge of many": compiled(
        merge._merge_kernel, ASTSource, SHAPE | MERGE | dict(MERGE_ROWS=8, MERGE_PIECES=4)
    ),
    "narrow": compiled(
        hopper.attend_kernel, GluonASTSource, SHAPE | READ | NARROW, gluon_tile,
        maxnreg=hopper.REGISTERS[1],
    ),
    "wide": compiled(
        hopper.attend_kernel, GluonASTSource, SHAPE | READ | WIDE, gluon_tile,
        maxnreg=hopper.REGISTERS[2],
    ),
}))
"""


@pytest.fixture(scope="module")
def kernels() -> dict[str, Any]:
    """In a process of its own, as this one may run Triton's interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "programs"),
    [("attention", 2), ("merge", 1), ("merge of many", 8), ("narrow", 2), ("wide", 1)],
)
def test_they_fit_on_a_multiprocessor(kernels: Any, name: str, programs: int) -> None:
    assert programs * (kernels[name]["shared"] + 1024) <= 228 << 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attention", "merge", "merge of many", "narrow", "wide"])
def test_the_first_user_of_a_work_list_waits_before_anything_looks_at_it(
    kernels: Any, name: str
) -> None:
    """Nothing else makes sure that it sees what the planner wrote, and so with what it lets in."""
    assert kernels[name]["in_order"], "expected the wait, then who may follow, then the first load"
