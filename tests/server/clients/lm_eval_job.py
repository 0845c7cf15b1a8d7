"""lm-eval's local-completions against the server: 50 questions by log-likelihood, some by what is said.

Its tokenizer is the server's own, over /tokenizer_info, /tokenize and /detokenize; nothing is fetched.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

_CACHE = tempfile.TemporaryDirectory(prefix="lm-eval-")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": _CACHE.name}

from checks import BASE_URL, KEY, MODEL, check, equal, report  # noqa: E402

HERE = Path(__file__).parent / "capitals"
ITEMS = 50
os.environ["OPENAI_API_KEY"] = KEY


def _evaluated(task: str, limit: int | None = None, **more: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # The task names its data by a path from here.
    os.chdir(HERE)
    results = simple_evaluate(
        model="local-completions",
        model_args={
            "model": MODEL,
            "base_url": f"{BASE_URL}/v1/completions",
            "auth_token": KEY,
            "tokenizer_backend": "remote",
            "max_retries": 1,
            **more,
        },
        tasks=[task],
        task_manager=TaskManager(include_path=str(HERE), include_defaults=False),
        bootstrap_iters=0,
        limit=limit,
    )
    assert results is not None
    return dict(results)


def _scores(results: dict[str, Any]) -> list[float]:
    """The log-likelihood of every choice of every question."""
    samples = sorted(results["samples"]["capitals"], key=lambda one: one["doc_id"])
    return [float(response[0]) for sample in samples for response in sample["filtered_resps"]]


@check
def choices_are_scored_the_same_by_token_and_by_text() -> None:
    by_token = _evaluated("capitals", num_concurrent=4)
    equal(by_token["n-samples"]["capitals"]["effective"], ITEMS, "questions")
    accuracy = by_token["results"]["capitals"]["acc,none"]
    # One in four is chance.
    assert accuracy >= 0.6, by_token["results"]
    by_text = _evaluated("capitals", limit=10, tokenized_requests=False)
    in_batches = _evaluated("capitals", limit=10, batch_size=4)
    for other in (by_text, in_batches):
        near = zip(_scores(by_token), _scores(other), strict=False)
        assert all(abs(a - b) < 1e-2 for a, b in near)


@check
def answers_are_written() -> None:
    results = _evaluated("capitals_written", limit=10, num_concurrent=2)
    assert results["results"]["capitals_written"]["exact_match,none"] >= 0.5, results["results"]


@check
def tokenizer_is_found_by_itself() -> None:
    from lm_eval.utils import check_remote_tokenizer_support

    assert check_remote_tokenizer_support(f"{BASE_URL}/v1/completions", auth_token=KEY, timeout=60)


if __name__ == "__main__":
    report("lm_eval")
