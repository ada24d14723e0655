"""Verification by kernels against its definition in torch: rows, walks, and what a graph may hold.

In Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from specdec.batch import TreeBatch
from specdec.judge import Judgement, _forest, by_kernels, in_torch
from specdec.noise import Purpose, split_seeds, uniform
from specdec.rules import RULES, Greedy, SampleAndMatch, Typical
from specdec.sampling import Sampler, draw
from specdec.tree import ProposalLaw, TokenTree
from specdec.verify import Noise

pytest.importorskip("triton")

from specdec.kernels import scan, vocab, walks
from specdec.kernels.options import Cuts

# numpy, below the interpreter, remarks on rows without a maximum and on integers that wrap around.
pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value"),
    pytest.mark.filterwarnings("ignore:overflow"),
    pytest.mark.filterwarnings("ignore:divide by zero"),
]

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
V = 4500  # two chunks
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CUTS = {
    "temperature": Cuts(0.8),
    "top-k": Cuts(0.8, top_k=50),
    "top-p": Cuts(0.8, top_p=0.9),
    "top-k, top-p": Cuts(1.3, top_k=40, top_p=0.8),
    "min-p": Cuts(min_p=0.05),
    "all": Cuts(1.2, top_k=60, top_p=0.95, min_p=0.02),
}


def warpers(cuts: Cuts) -> tuple[Any, ...]:
    return (
        *([TemperatureLogitsWarper(cuts.temperature)] if cuts.temperature != 1 else []),
        *([TopKLogitsWarper(cuts.top_k)] if cuts.top_k else []),
        *([TopPLogitsWarper(cuts.top_p)] if cuts.top_p < 1 else []),
        *([MinPLogitsWarper(cuts.min_p)] if cuts.min_p else []),
    )


def kept_by(rows: vocab.Rows) -> Tensor:
    """[R, V] bool: the tokens that the kernel keeps."""
    x, place = rows.logits.float(), torch.arange(rows.logits.shape[1], device=DEVICE)
    bits = torch.where(x == 0, 0.0, x).view(torch.int32)
    key = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> scan.shift(rows.logits.dtype)
    inside = (key > rows.floor[:, None]) | (
        (key == rows.floor[:, None]) & (place >= rows.first[:, None])
    )
    share = ((x - rows.best[:, None]) / rows.cuts.temperature).exp()
    return inside & (share >= rows.cuts.min_p)


def later_ties(logits: Tensor, keep: Tensor) -> Tensor:
    """The same number of tokens of each value, the last ones: transformers' sort is not stable."""
    out = keep.clone()
    for row in range(len(logits)):
        edge = logits[row][keep[row]].min()
        equal = (logits[row] == edge).nonzero()[:, 0]
        out[row, equal] = False
        out[row, equal[len(equal) - int(keep[row, equal].sum()) :]] = True
    return out


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_keep_and_draw_what_transformers_and_torch_do(dtype: torch.dtype, name: str) -> None:
    spread = torch.tensor([[6.0], [2.0], [0.2]])  # the last one is nearly flat
    logits = (torch.randn(3, V) * spread).to(DEVICE, dtype)
    seeds, positions = split_seeds(3, 1, DEVICE), torch.tensor([7], device=DEVICE)
    tree, depths = torch.zeros(3, dtype=torch.int64, device=DEVICE), torch.arange(3, device=DEVICE)
    rows = vocab.distributions(
        logits, CUTS[name], seeds=seeds, positions=positions, tree=tree, depths=depths
    )
    scores = Sampler(True, warpers(CUTS[name])).draft_probs(logits)
    keep = later_ties(logits.float(), scores > 0)
    assert torch.equal(kept_by(rows), keep)
    share = ((logits.float() - rows.best[:, None]) / CUTS[name].temperature).exp() * keep
    torch.testing.assert_close(rows.norm, share.sum(1))
    numbers = uniform(seeds[tree], positions[tree] + depths, Purpose.SAMPLE)
    assert torch.equal(rows.tokens, draw(share, numbers))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_greatest_logit_is_the_first_of_equal_ones_and_nan_is_seen(dtype: torch.dtype) -> None:
    logits = torch.randn(5, V).to(dtype)
    logits[1, [4400, 37]] = 9.0
    logits[2, 4200] = torch.nan
    logits[3] = -torch.inf
    logits[4, 5] = torch.inf
    best, choices = scan.greatest(logits.to(DEVICE))
    assert choices.tolist() == logits.float().argmax(-1).tolist()
    assert best[:2].tolist() == logits[:2].float().amax(-1).tolist()
    assert best[2].isnan()
    assert best[3:].tolist() == [-torch.inf, torch.inf]
    drawn = vocab.distributions(logits.to(DEVICE), CUTS["top-p"])
    assert drawn.best.isfinite().tolist() == [True, True, False, False, False]


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    logits = torch.randn(3, V, device=DEVICE) * 3
    many, one = (vocab.distributions(x, CUTS["top-p"]) for x in (logits, logits[1:2]))
    for name in ("best", "norm", "floor", "first"):
        assert getattr(many, name)[1] == getattr(one, name)[0]


# Walks, over a vocabulary in which drafts are often right.
SMALL, NAMED = 24, 5


def random_tree(law: ProposalLaw, generator: torch.Generator) -> TokenTree:
    def integer(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    size = 1 + integer(10)
    parents = [-1, *(integer(node) for node in range(1, size))]
    names = torch.stack([torch.randperm(SMALL, generator=generator)[:NAMED] for _ in parents])
    probs = torch.rand(size, NAMED, generator=generator) ** 3
    probs[:, -1] = 0
    probs /= probs.sum(1, keepdim=True)
    tokens, left = [0], probs.clone()
    for parent in parents[1:]:
        if law == ProposalLaw.DETERMINISTIC:
            tokens.append(integer(SMALL // 3))
            continue
        # When nothing is left to draw, the name without any probability is chosen.
        some = bool(left[parent].sum() > 0)
        pick = int(torch.multinomial(left[parent], 1, generator=generator)) if some else NAMED - 1
        tokens.append(int(names[parent, pick]))
        if law == ProposalLaw.WITHOUT_REPLACEMENT:
            left[parent, pick] = 0
    drawn = law != ProposalLaw.DETERMINISTIC
    return TokenTree(
        torch.tensor(tokens),
        torch.tensor(parents),
        law,
        probs if drawn else None,
        names if drawn else None,
    )


def scene(law: ProposalLaw, trees: int = 5) -> tuple[TreeBatch, Tensor, Noise]:
    generator = torch.Generator().manual_seed(int(law))
    batch = TreeBatch.pack(
        [random_tree(law, generator) for _ in range(trees)], vocab_size=SMALL, device=DEVICE
    )
    logits = torch.randn(len(batch.tokens), SMALL, generator=generator).to(DEVICE)
    above = batch.offsets[batch.tree] + batch.parents.clamp_min(0)
    logits[above, batch.tokens] += 4  # so that something is accepted
    seeds = split_seeds(int(law), trees, DEVICE)
    return batch, logits, Noise(seeds, torch.arange(trees, device=DEVICE) + 5)


WALKS = ["greedy", "sample-and-match", "multi-round", "without-replacement", "traversal"]


@pytest.mark.parametrize("law", list(ProposalLaw))
@pytest.mark.parametrize("name", WALKS)
def test_kernels_decide_as_the_rules_do(name: str, law: ProposalLaw) -> None:
    rule = RULES[name]()
    if law not in rule.legal_laws:
        pytest.skip("an illegal pair")
    trees, logits, noise = scene(law)
    sampler = Sampler(True, warpers(Cuts(1.2, min_p=0.05)))
    target = sampler.probs(sampler.scores(logits, trees, [])) if rule.samples else logits
    wanted = rule.verify(trees, target, noise)
    found = Judgement(*by_kernels(rule, sampler, logits, trees, noise))
    assert torch.equal(found.outcome.paths, wanted.paths)
    assert torch.equal(found.outcome.next_tokens, wanted.next_tokens)
    assert torch.equal(found.outcome.continued, wanted.continued)
    assert found.healthy.all()
    assert (wanted.lengths > 1).any(), "something must have been accepted"


@pytest.mark.parametrize("name", WALKS)
def test_kernels_read_views_as_they_are(name: str) -> None:
    """Of three trees of one node, which have one memory; and of trees whose rows lie apart."""
    rule, sampler = RULES[name](), Sampler(True, warpers(Cuts(1.2, top_k=7)))
    trees, logits, noise = scene(max(rule.legal_laws), trees=3)
    given = {f.name: getattr(trees, f.name) for f in fields(trees)}
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    apart: dict[str, Any] = {name: x.repeat_interleave(2, 0)[::2] for name, x in tensors.items()}
    roots = TreeBatch.roots(torch.tensor([3, 4, 5], device=DEVICE))
    # What lies behind the one number that all see is another one.
    parents, words = (torch.tensor(x, device=DEVICE) for x in ([-1, 0, 0], [[1], [0], [0]]))
    once: dict[str, Any] = {
        "parents": parents[:1].expand(3),
        "ancestors": words.int()[:1].expand(3, 1),
    }
    for plain, views in ((trees, apart), (roots, once)):
        rows = len(plain.tokens)
        seen = replace(plain, **views)
        assert not seen.parents.is_contiguous()
        laid = [x for x in vars(_forest(seen)).values() if isinstance(x, Tensor)]
        assert all(x.is_contiguous() for x in laid)
        here = Noise(noise.seeds[: len(plain.sizes)], noise.next_positions[: len(plain.sizes)])
        wanted, found = (
            Judgement(*by_kernels(rule, sampler, logits[:rows], x, here)) for x in (plain, seen)
        )
        assert torch.equal(found.outcome.paths, wanted.outcome.paths)
        assert torch.equal(found.outcome.next_tokens, wanted.outcome.next_tokens)
        assert found.healthy.all()


@pytest.mark.parametrize("name", WALKS)
def test_a_broken_row_ends_its_own_request_alone(name: str) -> None:
    trees, logits, noise = scene(ProposalLaw.DETERMINISTIC, trees=3)
    logits[trees.offsets[1]] = torch.nan
    rule, sampler = RULES[name](), Sampler(True)
    found = Judgement(*by_kernels(rule, sampler, logits, trees, noise))
    assert found.healthy.tolist() == [True, False, True]


def test_it_is_said_why_torch_judges() -> None:
    trees, logits, _ = scene(ProposalLaw.IID, trees=2)
    if not GPU:
        assert in_torch(Greedy(), Sampler(), trees, logits) == "the logits are on cpu"
        return
    assert in_torch(Greedy(), Sampler(), trees, logits) is None
    assert in_torch(SampleAndMatch(), Sampler(True, warpers(CUTS["all"])), trees, logits) is None
    assert "no kernel" in str(in_torch(Typical(), Sampler(True), trees, logits))


def test_the_options_that_kernels_know_are_recognised() -> None:
    for cuts in CUTS.values():
        assert Sampler(True, warpers(cuts)).cuts == cuts
    assert Sampler(True, tuple(reversed(warpers(CUTS["all"])))).cuts is None
    assert Sampler(True, (TypicalLogitsWarper(0.5),)).cuts is None
    assert Sampler(True, (TopKLogitsWarper(5, min_tokens_to_keep=2),)).cuts is None


class NoWaiting(TorchDispatchMode):
    """Raises where the host would wait for a device, or hand it numbers of its own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")
        assert not any(word in name for word in waits), name
        assert "_to_copy" not in name or (kwargs or {}).get("device") is None, "moved"
        indices = args[1] if name.startswith(("aten::index.", "aten::index_put")) else ()
        assert not any(x is not None and x.dtype == torch.bool for x in indices), name
        return func(*args, **(kwargs or {}))


no_waiting: Any = NoWaiting


class Launch:
    """Stands for a kernel, whose own work is on the device."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("name", WALKS)
def test_a_decision_never_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vocab, walks):
        for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
            monkeypatch.setattr(module, kernel, Launch())
    generator = torch.Generator().manual_seed(1)
    tree = random_tree(ProposalLaw.DETERMINISTIC, generator)
    trees = TreeBatch.pack([tree] * 3, vocab_size=SMALL)
    logits = torch.randn(len(trees.tokens), SMALL)
    noise = Noise(split_seeds(0, 3), torch.arange(3))
    sampler = Sampler(True, warpers(CUTS["all"]))
    with no_waiting():
        by_kernels(RULES[name](), sampler, logits, trees, noise)
    with no_waiting(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        int(trees.tokens[0])
    if name != "traversal":  # in torch, it looks at the shape of trees on the host
        with no_waiting():
            RULES[name]().verify(trees, logits.softmax(-1), noise)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WALKS)
def test_a_graph_holds_a_decision(name: str) -> None:
    rule = RULES[name]()
    law = rule.draws or ProposalLaw.DETERMINISTIC
    generator = torch.Generator().manual_seed(1)
    tree = random_tree(law, generator)
    trees = TreeBatch.pack([tree] * 4, vocab_size=SMALL, device=DEVICE)
    logits = torch.randn(len(trees.tokens), SMALL, device=DEVICE)
    noise = Noise(split_seeds(0, 4, DEVICE), torch.arange(4, device=DEVICE))
    sampler = Sampler(True, warpers(CUTS["all"]))
    by_kernels(rule, sampler, logits, trees, noise)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = by_kernels(rule, sampler, logits, trees, noise)[0]
    logits.copy_(torch.randn(logits.shape, device=DEVICE) * 2)
    graph.replay()
    target = sampler.probs(sampler.scores(logits, trees, [])) if rule.samples else logits
    wanted = rule.verify(trees, target, noise)
    assert torch.equal(outcome.paths, wanted.paths)
    assert torch.equal(outcome.next_tokens, wanted.next_tokens)
