"""Best of n: sample several answers to one prompt, keep the one the model finds likeliest.

python examples/best_of_n.py
"""

from typing import Any

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec


def best_of(model: Any, prompt: list[int], n: int, new: int, seed: int, **options: Any) -> Any:
    """The best of n sampled answers and its mean log-probability per token."""
    with model.branch(prompt) as root:
        branches = root.fork(n)
        model.extend(branches, max_new_tokens=new, do_sample=True, seed=seed, **options)
        answers = [branch.tokens[len(prompt) :] for branch in branches]
        sums = specdec.score(root.fork(n), answers).tolist()
        means = [total / len(answer) for total, answer in zip(sums, answers, strict=True)]
        best = max(range(n), key=means.__getitem__)
        return answers[best], means[best]


def main() -> None:
    folder = specdec.models.fetch("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = specdec.wrap(AutoModelForCausalLM.from_pretrained(folder))
    talk = [{"role": "user", "content": "Name three uses of a brick."}]
    prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
    answer, mean = best_of(model, prompt, n=4, new=48, seed=1, temperature=0.9)
    Console().print(tokenizer.decode(answer, skip_special_tokens=True), f"({mean:.2f} per token)")


if __name__ == "__main__":
    main()
