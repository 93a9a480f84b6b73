"""DPO steps against TRL's trainer: `python tests/benchmarks/dpo_step.py [STEPS] [PAIRS.json]`.

One process, one thread, float32 on the CPU: the same Llama of about a million parameters, the same
pairs, the same rows a step, AdamW, and the reference's log-probs computed before the first step in
both. Seconds are of the processor and of the steps alone (loading, tokenising and the reference
pass are left out), so that a busy machine disturbs less. Prints pairs and tokens a second of both,
and the ratio. Rounds alternate; the median is taken.

Without a file the pairs are drawn: prompts of 64 to 192 random tokens, answers of 16 to 96.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments

from raylign.algorithms.preference import Numbers
from raylign.config import EngineConfig, ModelConfig, OptimizerConfig, ScheduleConfig
from raylign.data.comparisons import Answer, Compared, Wanted, read_comparisons
from raylign.models.assembly import ModelPlan
from raylign.models.loading import initialise, load_tokenizer, save_model
from raylign.models.presets import build_config
from raylign.tokenization.train import train_bpe
from raylign.training.compared_rows import write_compared
from raylign.training.comparisons import PreferenceObjective
from raylign.training.loop import SupervisedLoop, SupervisedTask
from raylign.training.references import Reference

BATCH, CONTEXT, ROUNDS, WARM = 8, 512, 3, 3
SHAPE = ModelConfig(hidden_size=128, layers=4, heads=4, kv_heads=4, ffn_size=384, context=CONTEXT)


@dataclass(frozen=True, slots=True)
class Setting:
    """What both train."""

    directory: Path
    """Of model and tokenizer."""
    pairs: list[Compared]
    steps: int

    @property
    def tokens(self) -> float:
        """Mean tokens of a pair, with the prompt counted for each answer."""
        return statistics.mean(
            sum(len(p.prompt) + len(a.token_ids) for a in p.answers) for p in self.pairs
        )


def build(directory: Path, file: Path | None, steps: int) -> Setting:
    stream = np.random.default_rng(1)
    texts = ["".join(map(chr, stream.integers(97, 123, 9))) for _ in range(999)]
    if file is not None:
        texts = [json.dumps(row, ensure_ascii=False) for row in json.loads(file.read_text("utf-8"))]
    tokenizer = train_bpe(texts, 1024 if file is None else 2048)
    shape = build_config(
        SHAPE, len(tokenizer), pad_id=tokenizer.pad_token_id, eos_id=tokenizer.eos_token_id
    )
    save_model(initialise(shape, 0), shape, tokenizer, directory)
    tokenizer = load_tokenizer(directory)
    if file is None:
        pairs = draw_pairs(max(64, BATCH * steps), len(tokenizer), tokenizer.eos_token_id)
    else:
        wanted = Wanted("pairs", "preference", CONTEXT, "truncate")
        pairs = read_comparisons(file, tokenizer, wanted).items
    return Setting(directory, pairs, steps)


def draw_pairs(count: int, vocabulary: int, eos: int) -> list[Compared]:
    stream = np.random.default_rng(0)

    def draw(low: int, high: int) -> np.ndarray:
        return stream.integers(8, vocabulary, stream.integers(low, high + 1)).astype(np.int32)

    def answer() -> Answer:
        ids = np.append(draw(16, 96), np.int32(eos))
        return Answer(ids, np.ones(len(ids), np.uint8))

    return [Compared(draw(64, 192), (answer(), answer()), row=n) for n in range(count)]


def time_ours(setting: Setting, share_prompts: bool = True) -> float:
    """CPU seconds a step of the supervised loop."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name)
        for split, part in (("train", setting.pairs), ("validation", setting.pairs[:2])):
            write_compared(part, output / "rows", split)
        task = SupervisedTask(
            name="preference",
            output=output,
            model=ModelPlan(setting.directory, 0),
            tokenizer=setting.directory,
            objective=PreferenceObjective(
                output / "rows",
                "dpo",
                Numbers(beta=0.1),
                0,
                reference=Reference(output / "reference", batch=BATCH),
                share_prompts=share_prompts,
            ),
            seed=0,
            steps=setting.steps,
            batch_size=BATCH,
            micro_batch_size=BATCH,
            checkpoint_every=10**6,
            optimizer=OptimizerConfig(lr=1e-4, weight_decay=0.0),
            schedule=ScheduleConfig(shape="linear", warmup_steps=0),
            engine=EngineConfig(backend="torch"),
            threads=1,
            prompts=(),
            sample_tokens=1,
        )
        loop = _TimedLoop(task)
        loop.run()
        return loop.mean()


class _TimedLoop(SupervisedLoop):
    """Keeps the processor's time at the beginning of each step."""

    def _take_step(self, step: int, rate: float) -> float:
        self.__dict__.setdefault("marks", []).append(time.process_time())
        norm = super()._take_step(step, rate)
        self.last = time.process_time()
        return norm

    def mean(self) -> float:
        marks = [*self.__dict__["marks"], self.last]
        return statistics.median(np.diff(marks)[WARM:])


def time_theirs(setting: Setting) -> float:
    """CPU seconds a step of TRL's DPOTrainer on the same tokens."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    tokenizer = load_tokenizer(setting.directory)
    with tempfile.TemporaryDirectory() as name:
        config = DPOConfig(
            output_dir=name,
            use_cpu=True,
            bf16=False,
            report_to=[],
            beta=0.1,
            max_steps=setting.steps,
            per_device_train_batch_size=BATCH,
            precompute_ref_batch_size=BATCH,
            precompute_ref_log_probs=True,
            gradient_checkpointing=False,
            max_length=CONTEXT,
            learning_rate=1e-4,
            logging_strategy="no",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            optim="adamw_torch_fused",
        )
        clock = _Clock()
        trainer = _TokenTrainer.make(DPOTrainer)(
            model=AutoModelForCausalLM.from_pretrained(
                setting.directory, attn_implementation="sdpa", dtype=torch.float32
            ),
            args=config,
            train_dataset=Dataset.from_list(
                [
                    {
                        "prompt": "",
                        "chosen": "",
                        "rejected": "",
                        "prompt_ids": pair.prompt.tolist(),
                        "chosen_ids": pair.answers[0].token_ids.tolist(),
                        "rejected_ids": pair.answers[1].token_ids.tolist(),
                    }
                    for pair in setting.pairs
                ]
            ),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.train()
        return statistics.median(np.diff(clock.marks)[WARM:])


class _TokenTrainer:
    """TRL's trainer on rows that are tokens already: the same ones, without its tokenising."""

    @staticmethod
    def make(trainer: type) -> type:
        class Given(trainer):  # type: ignore[misc]
            def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
                return dataset.remove_columns(["prompt", "chosen", "rejected"])

        return Given


class _Clock(TrainerCallback):
    """The processor's time at the beginning of each step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_begin(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self.marks.append(time.process_time())


def main(steps: int, file: Path | None) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        setting = build(Path(name), file, steps)
        parameters = sum(
            p.numel()
            for p in initialise(build_config(SHAPE, 512, pad_id=0, eos_id=1), 0).parameters()
        )
        sys.stdout.write(
            f"{len(setting.pairs)} pairs of {setting.tokens:.0f} tokens, {BATCH} a step, "
            f"{steps} steps, about {parameters / 1e6:.1f} M parameters\n"
        )
        times: dict[str, list[float]] = {"ours": [], "ours, prompts twice": [], "TRL": []}
        for _ in range(ROUNDS):
            times["ours"].append(time_ours(setting))
            times["ours, prompts twice"].append(time_ours(setting, share_prompts=False))
            times["TRL"].append(time_theirs(setting))
    for name, seconds in times.items():
        each = statistics.median(seconds)
        rate, tokens = BATCH / each, BATCH * setting.tokens / each
        sys.stdout.write(
            f"{name:<20}{rate:>9.1f} pairs/s{tokens:>10,.0f} tokens/s{each * 1e3:>8.0f} ms a step\n"
        )
    ratio = statistics.median(times["TRL"]) / statistics.median(times["ours"])
    sys.stdout.write(f"{'ratio':<20}{ratio:>9.2f}\n")


if __name__ == "__main__":
    main(
        int(sys.argv[1]) if len(sys.argv) > 1 else 20,
        Path(sys.argv[2]) if len(sys.argv) > 2 else None,
    )
