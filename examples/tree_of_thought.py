"""Tree of thought: branch into several next thoughts, score them, go on from the best few.

python examples/tree_of_thought.py
"""

from typing import Any

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec


def think(
    model: Any, prompt: list[int], verdict: list[int], *, depth: int, width: int, keep: int,
    new: int, seed: int,
) -> tuple[list[int], list[float]]:  # fmt: skip
    """The best line of thoughts, and the score of its last thoughts at each depth.

    A thought is as good as the model finds `verdict` likely after it.
    """
    with model.branch(prompt) as root:
        frontier, best = [root], []
        for level in range(depth):
            thoughts = [child for branch in frontier for child in branch.fork(width)]
            model.extend(thoughts, max_new_tokens=new, do_sample=True, seed=seed + level)
            scores = specdec.score(thoughts, [verdict] * len(thoughts))
            chosen = scores.topk(min(keep, len(thoughts)))
            best.append(chosen.values[0].item())
            kept = [thoughts[index] for index in chosen.indices.tolist()]
            for branch in [*frontier, *thoughts]:
                if branch not in kept:
                    branch.prune()
            frontier = kept
        return frontier[0].tokens[len(prompt) :], best


def main() -> None:
    folder = specdec.models.fetch("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = specdec.wrap(AutoModelForCausalLM.from_pretrained(folder))
    talk = [{"role": "user", "content": "Plan a picnic for six people, step by step."}]
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    verdict = tokenizer(" This is a good plan.")["input_ids"]
    line, scores = think(model, prompt, verdict, depth=3, width=3, keep=2, new=24, seed=1)
    Console().print(tokenizer.decode(line, skip_special_tokens=True))
    Console().print("scores:", [round(score, 2) for score in scores])


if __name__ == "__main__":
    main()
