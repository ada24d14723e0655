"""The arms of the attention benchmark: our modes, and what others offer for the same task.

A peer says which cases it applies to, and prepares a case: everything that a server would do once
for all layers of a forward happens there. What is left, `run`, is timed.

Letters: R rows, B requests, T rows of a request, K keys of a request, Hq/Hkv heads, D head dim.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from specdec.attention import AttentionPlan, Backend, tree_attention
from specdec.eval.attention import clock
from specdec.eval.attention.cases import Case
from specdec.eval.attention.data import MEMORY, Data
from specdec.eval.attention.report import OURS
from specdec.kernels.partition import MODES, Mode
from specdec.kernels.worklist import Schedule

MASK_ELEMENTS = 2**26
GATHERED_BYTES = 4e9
FLASHINFER_WORKSPACE = 2**29
FLASHINFER_MASK = 2**30


@dataclass(frozen=True)
class Prepared:
    """A case made ready for one peer."""

    run: clock.Run  # [R, Hq, D] from set i
    plan_us: Callable[[], float] | None = None  # measures what a forward pays once for all layers
    plan_on: Literal["device", "host"] | None = None
    detail: str = ""  # what runs, where a library chooses


@dataclass(frozen=True)
class Peer:
    """One arm."""

    name: str
    applies: Callable[[Case], str | None]  # why it does not apply; None if it does
    prepare: Callable[[Data], Prepared]
    paged: bool = True


def _always(_: Case) -> None:
    return None


def _prepare_ours(mode: Mode, data: Data, backend: Backend = "triton") -> Prepared:
    case = data.case
    plan = data.plan if backend == "triton" else data.new_plan()  # a work list of its own

    def run(index: int) -> Tensor:
        return tree_attention(
            data.queries[index], data.pools[index], plan, backend=backend, mode=mode
        )

    run(0)
    built = schedule_of(plan, mode)

    def build(_: int) -> Tensor:
        fresh = replace(plan)  # the same tensors, no schedules yet
        return fresh.schedule(
            case.heads, case.kv_heads, built.window, mode, built.tiling, built.programs
        ).header

    def plan_us() -> float:
        timed = clock.capture(build, 1)
        timed.measure(5e3, 10e3)
        return timed.us

    return Prepared(run, plan_us, "device", f"{built.programs} programs of {built.tiling}")


def schedule_of(plan: AttentionPlan, mode: Mode) -> Schedule:
    """The work list that the last call in `mode` built and the plan keeps."""
    return next(built for built in plan._schedules.values() if built.mode == mode)


def _sdpa_applies(case: Case) -> str | None:
    if case.ragged:
        return "requests differ in length"
    keys = case.prefix + case.rows
    if case.requests * case.rows * keys > MASK_ELEMENTS:
        return f"a mask of more than {MASK_ELEMENTS} elements"
    if _gathered_bytes(case) > GATHERED_BYTES:
        return f"more than {GATHERED_BYTES / 1e9:.0f} GB of gathered keys and values"
    return None


def _gathered_bytes(case: Case, element: int = 2) -> int:
    keys = case.requests * (case.prefix + case.rows)
    return 2 * keys * case.kv_heads * case.dim * element


class _Dense:
    """Requests of one length, for attention over [B, H, K, D]."""

    def __init__(self, data: Data) -> None:
        self.data, case = data, data.case
        self.slots = torch.cat([data.keys_of(request) for request in range(case.requests)])
        self.mask = None  # [B, 1, T, K] bool
        if case.rows > 1:
            mask = torch.ones(case.rows, case.prefix + case.rows, dtype=torch.bool)
            mask[:, case.prefix :] = data.mask()
            self.mask = mask.to(data.device).expand(case.requests, 1, -1, -1)

    def gather(self, pages: Tensor) -> Tensor:
        """[B, Hkv, K, D] from [pages, page_size, Hkv, D]."""
        _, _, heads, dim = pages.shape
        rows = pages.flatten(0, 1).index_select(0, self.slots)
        return rows.view(self.data.case.requests, -1, heads, dim).transpose(1, 2)

    def arguments(self, index: int, keys: Tensor, values: Tensor) -> dict[str, Any]:
        case = self.data.case
        query = self.data.queries[index].view(case.requests, case.rows, case.heads, case.dim)
        return {
            "query": query.transpose(1, 2),
            "key": keys,
            "value": values,
            "attn_mask": self.mask,
            "enable_gqa": case.heads != case.kv_heads,
        }

    def attend(self, index: int, keys: Tensor, values: Tensor) -> Tensor:
        """[R, Hq, D]."""
        out: Tensor = F.scaled_dot_product_attention(**self.arguments(index, keys, values))
        return out.transpose(1, 2).flatten(0, 1)

    def backend(self, keys: Tensor, values: Tensor) -> str:
        """Which of torch's kernels the arguments lead to."""
        choice = torch._fused_sdp_choice(**self.arguments(0, keys, values))
        names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
        return names.get(int(choice), str(int(choice)))


def _prepare_sdpa(data: Data) -> Prepared:
    """Gathers the pages in every call."""
    dense = _Dense(data)

    def run(index: int) -> Tensor:
        pool = data.pools[index]
        return dense.attend(index, dense.gather(pool.keys), dense.gather(pool.values))

    pool = data.pools[0]
    return Prepared(run, detail=dense.backend(dense.gather(pool.keys), dense.gather(pool.values)))


def _prepare_sdpa_dense(data: Data) -> Prepared:
    """Has gathered them before."""
    dense = _Dense(data)
    # Shared keys are there once for each request, so fewer sets than pools may fill the memory;
    # each is then as much larger, and the cache stays as cold.
    held = int(max(1, min(data.sets, MEMORY // _gathered_bytes(data.case, data.dtype.itemsize))))
    pools = [(dense.gather(p.keys), dense.gather(p.values)) for p in data.pools[:held]]
    pools = [(keys.contiguous(), values.contiguous()) for keys, values in pools]

    def run(index: int) -> Tensor:
        return dense.attend(index, *pools[index % held])

    return Prepared(run, detail=dense.backend(*pools[0]))


def _flex_applies(case: Case) -> str | None:
    if len(case.levels) > 1 or case.ragged or case.requests > 8:
        return "up to 8 private requests of one length only"
    if case.page_size not in (64, 128):
        return "pages of 64 or 128 tokens only"
    return None


def _prepare_flex(data: Data) -> Prepared:
    """FlexAttention over the pool as one long text: a block of its mask is a page.

    Blocks of the prefix are full, so only the last ones of each request ask the mask function.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    case, device = data.case, data.device
    size, requests, rows = case.page_size, case.requests, case.rows
    tokens = data.layout.pages * size
    owner = torch.full((tokens,), -1, device=device)
    place = torch.zeros(tokens, dtype=torch.int64, device=device)  # behind the prefix
    for request in range(requests):
        slots = data.keys_of(request)
        owner[slots] = request
        place[slots] = torch.arange(len(slots), device=device) - case.prefix
    tree = data.mask().to(device)

    def sees(batch: Tensor, _: Tensor, row: Tensor, key: Tensor) -> Tensor:
        ancestor = tree[row, place[key].clamp(0, rows - 1)]
        return (owner[key] == batch) & ((place[key] < 0) | ancestor)

    whole = case.prefix // size
    used = -(-(case.prefix + rows) // size)

    def blocks(first: int, last: int) -> tuple[Tensor, Tensor]:
        """Counts [B, 1, 1] and indices [B, 1, 1, pages] of pages `first` to `last`."""
        indices = torch.zeros(requests, 1, 1, data.layout.pages, dtype=torch.int32)
        indices[:, 0, 0, : last - first] = data.table[:, first:last]
        counts = torch.full((requests, 1, 1), last - first, dtype=torch.int32)
        return counts.to(device), indices.to(device)

    mask = BlockMask.from_kv_blocks(
        *blocks(whole, used),
        *blocks(0, whole),
        BLOCK_SIZE=(128, size),
        mask_mod=sees,
        seq_lengths=(rows, tokens),
    )
    torch._dynamo.reset()  # every shape is compiled anew, and few are kept
    compiled = torch.compile(flex_attention, dynamic=False)
    packed = rows * case.heads // case.kv_heads
    block_m = min(64, max(16, 1 << (packed - 1).bit_length()))
    # The defaults find no kernel for a large tree, and run a pipeline of one stage on a small one.
    options: Any = {"BLOCK_M": block_m, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}

    def as_text(pages: Tensor) -> Tensor:
        return pages.flatten(0, 1).transpose(0, 1)[None]  # [1, Hkv, tokens, D]

    def run(index: int) -> Tensor:
        out = compiled(
            data.queries[index].view(requests, rows, case.heads, case.dim).transpose(1, 2),
            as_text(data.pools[index].keys),
            as_text(data.pools[index].values),
            block_mask=mask,
            enable_gqa=case.heads != case.kv_heads,
            kernel_options=options,
        )
        return out.transpose(1, 2).flatten(0, 1)

    return Prepared(run, detail=str(options))


def _flashinfer_applies(case: Case) -> str | None:
    if importlib.util.find_spec("flashinfer") is None:
        return "not installed"
    masked = case.rows > 1 and case.tree != "chain"
    if masked and case.requests * case.rows * (case.prefix + case.rows) > FLASHINFER_MASK:
        return f"a mask of more than {FLASHINFER_MASK} elements"
    return None


def _prepare_flashinfer(data: Data) -> Prepared:
    """Its paged decode for one row, its paged prefill for chains and, with a mask, for trees.

    A wrapper of its own for every case: planning frees what the last plan of a wrapper allocated,
    which a captured graph would still read.
    """
    flashinfer: Any = importlib.import_module("flashinfer")
    case = data.case
    lengths = [prefix + case.rows for prefix in data.layout.prefixes]
    used = [-(-length // case.page_size) for length in lengths]
    tables = zip(data.layout.tables, used, strict=True)
    starts = torch.tensor([0, *used], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    pages = torch.tensor([page for table, n in tables for page in table[:n]], dtype=torch.int32)
    last = torch.tensor([(n - 1) % case.page_size + 1 for n in lengths], dtype=torch.int32)
    heads = (case.heads, case.kv_heads, case.dim, case.page_size)
    types = {"q_data_type": data.dtype, "kv_data_type": data.dtype}
    workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=data.device)
    if case.rows == 1:
        # Packing the rows of a group for the tensor cores pays as soon as there is a group.
        grouped = case.heads != case.kv_heads
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=grouped
        )
        plan = partial(wrapper.plan, starts, pages, last, *heads, **types)
        detail = "decode, tensor cores" if grouped else "decode"
    else:
        chain = case.tree == "chain"
        backend = "auto" if chain else "fa2"  # the only one that takes masks
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        rows = torch.arange(case.requests + 1, dtype=torch.int32) * case.rows
        mask = None if chain else _flat_mask(data)
        plan = partial(
            wrapper.plan, rows, starts, pages, last, *heads, causal=chain, custom_mask=mask, **types
        )
        detail = f"prefill {backend}, " + ("causal" if chain else "custom mask")
    plan()

    def run(index: int) -> Tensor:
        pool = data.pools[index]
        out: Tensor = wrapper.run(data.queries[index], (pool.keys, pool.values))
        return out

    return Prepared(run, partial(_wall_us, plan), "host", detail)


def _flat_mask(data: Data) -> Tensor:
    """[sum of T x K] bool: prefix and tree of every request, one after the other."""
    tree, rows = data.mask(), data.case.rows
    parts = [
        torch.cat([torch.ones(rows, prefix, dtype=torch.bool), tree], 1).flatten()
        for prefix in data.layout.prefixes
    ]
    return torch.cat(parts).to(data.device)


def _wall_us(work: Callable[[], object], times: int = 5) -> float:
    """Median microseconds until the device is done."""
    samples = []
    for _ in range(times):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - begin) * 1e6)
    return statistics.median(samples)


PEERS = {
    peer.name: peer
    for peer in (
        *(Peer(f"{OURS}{mode}", _always, partial(_prepare_ours, mode)) for mode in reversed(MODES)),
        Peer("gluon", _always, partial(_prepare_ours, "auto", backend="gluon")),
        Peer("sdpa", _sdpa_applies, _prepare_sdpa),
        Peer("sdpa_dense", _sdpa_applies, _prepare_sdpa_dense, paged=False),
        Peer("flex", _flex_applies, _prepare_flex),
        Peer("flashinfer", _flashinfer_applies, _prepare_flashinfer),
    )
}

DEFAULT = ("ours:auto", "sdpa", "flashinfer")
"""FlexAttention is left out because it compiles for long."""


def named(names: Iterable[str]) -> list[Peer]:
    """Peers by name; `ours` stands for all our modes."""
    chosen = []
    for name in names:
        if name not in PEERS and name != "ours":
            raise ValueError(f"peers: expected ours, {', '.join(PEERS)}, got {name!r}")
        chosen += [peer for peer in PEERS if peer.startswith(OURS)] if name == "ours" else [name]
    return [PEERS[name] for name in dict.fromkeys(chosen)]
