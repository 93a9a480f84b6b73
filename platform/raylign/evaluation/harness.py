"""lm-evaluation-harness over any `Generator`: every lm-eval task runs on what serves rollouts.

The harness asks three kinds of question: generate until a string, the log-likelihood of a
continuation given a context, and the log-likelihood of a whole text in windows.
"""

from __future__ import annotations

import math
import os
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from raylign.config import UserError
from raylign.evaluation.catalog import load_tasks
from raylign.evaluation.uncertainty import measure_ratio
from raylign.inference.generator import Generator, Sampling, generate


class GeneratorLM(TemplateLM):
    """An lm-eval model whose tokens come from a `Generator`.

    `max_length` is the longest sequence (prompt and answer) in tokens, `max_tokens` the longest
    answer of a task that does not say. Where context ends and continuation begins is decided by
    lm-eval's own `TemplateLM`, so scores agree with its other backends.
    """

    def __init__(
        self,
        generator: Generator,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        max_tokens: int,
    ) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path} has no eos token; evaluation needs one to "
                "begin and end texts: set `eos_token` in its tokenizer_config.json"
            )
        self.generator, self.tokenizer = generator, tokenizer
        self.max_length, self._max_tokens = max_length, max_tokens

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """Conditions the first token of a text: bos where the tokenizer has one, else eos."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one string; raises `UserError` without a template."""
        require_chat_template(self.tokenizer)
        rendered = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(rendered)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of `string`; a bos that the text already spells is not added again."""
        bos = self.tokenizer.bos_token
        if add_special_tokens is None and bos is not None and string.startswith(bos):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, **options).input_ids)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers cut at the first of each request's stop strings, or at the end of the turn."""
        groups: dict[Sampling, list[int]] = defaultdict(list)
        stops: list[list[str]] = []
        for index, request in enumerate(requests):
            options = normalize_gen_kwargs(request.args[1], self._max_tokens)
            stops.append([*options["until"], self.tokenizer.eos_token])
            groups[self._sampling(options)].append(index)
        answers = [""] * len(requests)
        for sampling, indices in groups.items():
            room = self.max_length - sampling.max_tokens
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in indices]
            samples = generate(self.generator, prompts, sampling)
            for i, (sample,) in zip(indices, samples, strict=True):
                answers[i] = _cut(sample.text, stops[i])
        return answers

    def _sampling(self, options: Mapping[str, Any]) -> Sampling:
        return Sampling(
            temperature=float(options.get("temperature", 0.0)),
            top_p=float(options.get("top_p", 1.0)),
            top_k=max(0, int(options.get("top_k", 0))),
            max_tokens=min(int(options["max_gen_toks"]), self.max_length - 1),
        )

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of each whole text, in windows that give every token as much context as fits."""
        owners: list[int] = []
        windows: list[tuple[list[int], list[int]]] = []
        for index, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                # A generator scores max_length - 1 tokens, the prefix token among them.
                max_seq_len=self.max_length - 2,
                context_len=1,
            )
            for pair in pairs:
                owners.append(index)
                windows.append(make_disjoint_window(pair))
        totals = [0.0] * len(requests)
        for owner, logprobs in zip(owners, self._score(windows), strict=True):
            totals[owner] += math.fsum(logprobs)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        # A context that does not fit loses its beginning; a continuation is never cut.
        pairs = [
            (context[-max(1, self.max_length - 1 - len(continuation)) :], continuation)
            for _, context, continuation in requests
        ]
        scores = self._score(pairs)
        greedy = self._compare_greedy(pairs, scores)
        return [(math.fsum(s), g) for s, g in zip(scores, greedy, strict=True)]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Log-probability of every continuation token."""
        rows = self.generator.score([[*context, *continuation] for context, continuation in pairs])
        return [
            row[len(context) :].astype(float).tolist()
            for row, (context, _) in zip(rows, pairs, strict=True)
        ]

    def _compare_greedy(
        self, pairs: Sequence[tuple[list[int], list[int]]], scores: Sequence[Sequence[float]]
    ) -> list[bool]:
        """Whether greedy decoding would write each continuation.

        A token above one half is the most likely one, and one below 1/V is not; only what these
        two bounds leave open is decoded, once a context.
        """
        floor, half = -math.log(len(self.tokenizer)), math.log(0.5)
        verdicts: list[bool] = []
        open_pairs: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, ((context, _), logprobs) in enumerate(zip(pairs, scores, strict=True)):
            verdicts.append(all(value > half for value in logprobs))
            if not verdicts[-1] and all(value >= floor for value in logprobs):
                open_pairs[tuple(context)].append(index)
        by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for prompt, indices in open_pairs.items():
            by_length[max(len(pairs[i][1]) for i in indices)].append(prompt)
        for length, contexts in by_length.items():
            sampling = Sampling(temperature=0.0, max_tokens=length)
            samples = generate(self.generator, contexts, sampling)
            for prompt, (sample,) in zip(contexts, samples, strict=True):
                for i in open_pairs[prompt]:
                    wanted = pairs[i][1]
                    verdicts[i] = list(sample.token_ids[: len(wanted)]) == wanted
        return verdicts


def evaluate_model(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    task_path: Path | Sequence[Path] | None = None,
    limit: int | None = None,
    *,
    chat: bool = True,
    max_length: int = 2048,
    max_tokens: int = 96,
    seed: int = 0,
    offline: bool = True,
) -> dict[str, Any]:
    """Run lm-eval `tasks`, found below `task_path` or among lm-eval's own.

    Returns {"metrics": {task: {metric: {"value", "stderr", "n"}}}, "higher_is_better": {task:
    {metric: bool}}, "documents": {task: [{"doc", "answer", "scores", "likelihoods"}]}}: `answer` is
    the generated text (None for scored tasks), `scores` the document's own value of each plain
    metric, `likelihoods` [log-likelihood, weight] of each that is a ratio. Raises `UserError` for
    an unknown task, a task whose data cannot be had, and `chat` without a chat template.
    """
    if chat:
        require_chat_template(tokenizer)
    paths = [] if task_path is None else [task_path] if isinstance(task_path, Path) else task_path
    model = GeneratorLM(generator, tokenizer, max_length=max_length, max_tokens=max_tokens)
    with _network(offline):
        loaded = load_tasks(tasks, list(paths), seed, offline)
        # `evaluate`, not `simple_evaluate`: that one reseeds the process and lists its packages.
        found = evaluate(model, loaded, limit=limit, bootstrap_iters=1000, apply_chat_template=chat)
    assert found is not None  # None is for ranks other than 0; there is one process here
    samples = found["samples"]  # of tasks; groups have results only
    return {
        "higher_is_better": {n: dict(better) for n, better in found["higher_is_better"].items()},
        "metrics": {n: _summarize(r, samples.get(n, ())) for n, r in found["results"].items()},
        "documents": {name: [_pick(row) for row in rows] for name, rows in samples.items()},
    }


def require_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises `UserError` when `tokenizer` cannot render a conversation."""
    if not tokenizer.chat_template:
        raise UserError(
            f"tokenizer {tokenizer.name_or_path} has no chat template; "
            "set evaluate.chat=false to prompt with plain text, or save one with the tokenizer"
        )


def _cut(text: str, stops: Sequence[str]) -> str:
    """`text` before the first stop string."""
    ends = [text.find(stop) for stop in stops if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def _summarize(
    results: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float | int | None]]:
    """lm-eval's `metric,filter` keys as value, standard error and number of documents."""
    summary: dict[str, dict[str, float | int | None]] = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        rows = [s[metric] for s in samples if s["filter"] == kind and metric in s]
        stderr = results.get(f"{metric}_stderr,{kind}")
        if not isinstance(stderr, int | float):
            stderr = _ratio_stderr(metric, float(value), rows)
        name = metric if kind == "none" else f"{metric} ({kind})"
        count = len(rows) or int(results.get("sample_len", 0))
        summary[name] = {"value": float(value), "stderr": stderr, "n": count}
    return summary


def _ratio_stderr(metric: str, value: float, rows: Sequence[Any]) -> float | None:
    """Standard error of bits per byte and perplexities, which lm-eval leaves out.

    Their rows are (log-likelihood, weight), and they are functions of the ratio of the sums.
    """
    slopes = {"bits_per_byte": 1 / math.log(2), "byte_perplexity": value, "word_perplexity": value}
    if metric not in slopes or not rows or not all(map(_is_pair, rows)):
        return None
    _, stderr = measure_ratio(rows)
    return None if stderr is None else slopes[metric] * stderr


def _is_pair(row: Any) -> bool:
    return isinstance(row, tuple | list) and len(row) == 2


def _pick(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of one document."""
    answers = sample["filtered_resps"]
    return {
        "doc": dict(sample["doc"]),
        "answer": answers[0] if answers and isinstance(answers[0], str) else None,
        "scores": {
            m: float(sample[m]) for m in sample["metrics"] if isinstance(sample[m], int | float)
        },
        "likelihoods": {m: list(sample[m]) for m in sample["metrics"] if _is_pair(sample[m])},
    }


@contextmanager
def _network(offline: bool) -> Iterator[None]:
    """Close the way to the Hugging Face Hub for the block, when `offline`.

    The libraries read their environment once, at import, so those already here are told as well.
    """
    if not offline:
        yield
        return
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    before = {name: os.environ.get(name) for name in names}
    modules = [sys.modules.get(m) for m in ("huggingface_hub.constants", "datasets.config")]
    told = [(m, n, getattr(m, n)) for m in modules for n in names if hasattr(m, n)]
    os.environ.update(dict.fromkeys(names, "1"))
    for module, name, _ in told:
        setattr(module, name, True)
    try:
        yield
    finally:
        for module, name, value in told:
            setattr(module, name, value)
        for name, old in before.items():
            if old is None:
                del os.environ[name]
            else:
                os.environ[name] = old
