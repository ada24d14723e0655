"""Few-shot batch: many questions below one prompt of examples, which is computed once.

python examples/few_shot.py
"""

from typing import Any

from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

import specdec

EXAMPLES = "".join(
    f"Word: {word}\nOpposite: {opposite}\n\n"
    for word, opposite in [("hot", "cold"), ("big", "small"), ("early", "late"), ("wet", "dry")]
)


def ask(model: Any, examples: list[int], questions: list[list[int]], new: int) -> list[list[int]]:
    """The answers to all questions, greedily."""
    with model.branch(examples) as prompt:
        branches = prompt.fork(len(questions))
        for branch, question in zip(branches, questions, strict=True):
            branch.append(question)
        starts = [len(branch.tokens) for branch in branches]
        model.extend(branches, max_new_tokens=new, do_sample=False)
        return [branch.tokens[start:] for branch, start in zip(branches, starts, strict=True)]


def main() -> None:
    folder = specdec.models.fetch("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = specdec.wrap(AutoModelForCausalLM.from_pretrained(folder))
    words = ["fast", "young", "light", "full"]
    questions = [tokenizer(f"Word: {word}\nOpposite:")["input_ids"] for word in words]
    answers = ask(model, tokenizer(EXAMPLES)["input_ids"], questions, new=4)
    for word, answer in zip(words, answers, strict=True):
        Console().print(word, "->", tokenizer.decode(answer).strip().splitlines()[0])


if __name__ == "__main__":
    main()
