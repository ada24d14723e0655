from collections import Counter

from specdec.eval.prompts import DEMO_PROMPT, builtin_prompts


def test_there_are_ten_prompts_in_each_of_eight_categories() -> None:
    counts = Counter(prompt.category for prompt in builtin_prompts())
    assert len(counts) == 8
    assert set(counts.values()) == {10}


def test_ids_are_unique_and_the_demo_prompt_is_one_of_them() -> None:
    ids = [prompt.id for prompt in builtin_prompts()]
    assert len(set(ids)) == len(ids) == 80
    assert DEMO_PROMPT in ids


def test_every_prompt_is_one_message_of_the_user() -> None:
    for prompt in builtin_prompts():
        (message,) = prompt.messages
        assert set(message) == {"role", "content"}
        assert message["role"] == "user"
        assert message["content"].strip() == message["content"] != ""
