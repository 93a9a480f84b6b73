"""Is this machine ready? `python -m jobs.doctor [--engine]`.

Prints what was found and, for each problem, its remedy; status 0 when the quickstart can run, 2
when not. Needs no Ray. `--engine` also has vLLM answer once, and holds its probabilities against
those of transformers.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "cpu.lock"
GIB = 2**30

# Built against one torch each; a CUDA build beside a CPU torch breaks the imports below, and only
# those: a bare `import vllm` still works.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")
IMPORTS = "from vllm import LLM; from transformers import LlamaForCausalLM; import deepspeed"

State = Literal["good", "doubtful", "bad"]
_MARKS = {"good": "[green]✓[/]", "doubtful": "[yellow]![/]", "bad": "[red]✗[/]"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table."""

    subject: str
    state: State
    detail: str
    remedy: str = ""


def main() -> None:
    """Check everything, print the table, and exit."""
    unknown = [argument for argument in sys.argv[1:] if argument != "--engine"]
    if unknown:
        sys.stderr.write("usage: python -m jobs.doctor [--engine]\n")
        raise SystemExit(0 if unknown[0] in ("-h", "--help") else 2)
    checks: list[Callable[[], Finding]] = [
        check_python,
        check_lock,
        check_companions,
        check_imports,
        check_compiler,
        check_memory,
        check_shared_memory,
        check_disk,
        check_sockets,
        check_open_files,
        check_confinement,
        check_cluster,
        check_gpu,
    ]
    if "--engine" in sys.argv:
        checks.append(check_engine)
    raise SystemExit(report([check() for check in checks]))


def report(findings: list[Finding], console: Console | None = None) -> int:
    """Print the findings; 2 when one of them is bad, else 0."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for finding in findings:
        table.add_row(_MARKS[finding.state], f"[bold]{finding.subject}", finding.detail)
        if finding.remedy and finding.state != "good":
            table.add_row("", "", f"→ {finding.remedy}")
    console = console or Console(highlight=False)
    console.print(table)
    bad = [finding.subject for finding in findings if finding.state == "bad"]
    console.print(f"[red]not ready: {', '.join(bad)}" if bad else "[green]ready")
    return 2 if bad else 0


def check_python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    good = (3, 11) <= sys.version_info < (3, 14)
    return Finding(
        "Python", "good" if good else "bad", f"{version} ({sys.executable})", "use Python 3.11-3.13"
    )


def check_lock(lock: Path = LOCK) -> Finding:
    """Installed versions against the lock file."""
    if not lock.is_file():
        return Finding("packages", "good", "no lock file: not a checkout")
    wanted = dict(read_lock(lock))
    if "+" not in (find_version("torch") or "+"):
        return Finding("packages", "good", "a GPU environment; the lock is that of CPU machines")
    wrong = [
        f"{name} {found or 'missing'} (lock: {version})"
        for name, version in wanted.items()
        if (found := find_version(name)) != version
    ]
    if not wrong:
        return Finding("packages", "good", f"{len(wanted)} as locked, torch {wanted['torch']}")
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    return Finding(
        "packages", "bad", ", ".join(wrong[:3]) + more, f"requirements/install {sys.prefix}"
    )


def read_lock(lock: Path) -> Iterator[tuple[str, str]]:
    """Name and version of each line."""
    for line in lock.read_text(encoding="utf-8").splitlines():
        name, separator, version = line.partition("==")
        if separator and not line.startswith("#"):
            yield name, version


def find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_companions() -> Finding:
    """No CUDA build of torch's companions beside a CPU torch."""
    build = (find_version("torch") or "").partition("+")[2]
    found = {name: v for name in TORCH_COMPANIONS if (v := find_version(name)) is not None}
    clash = [name for name, v in found.items() if build == "cpu" and not v.endswith("+cpu")]
    return Finding(
        "torch companions",
        "bad" if clash else "good",
        ", ".join(f"{name} {v}" for name, v in found.items()) or "none, as it should be",
        f"{sys.executable} -m pip uninstall -y {' '.join(clash)}",
    )


def check_imports() -> Finding:
    """The imports that a bad combination of builds breaks, in a process of their own."""
    return _run_apart("imports", IMPORTS, "vLLM, transformers, DeepSpeed", timeout_s=180)


def check_engine() -> Finding:
    """One answer from vLLM."""
    code = "from jobs.doctor import prove_engine; prove_engine()"
    return _run_apart("engine", code, "", timeout_s=180)


def _run_apart(subject: str, code: str, detail: str, timeout_s: float) -> Finding:
    remedy = "rm -rf .venv && make install; if it stays, this is a defect: report the line above"
    quiet = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
    if not Path("/dev/nvidia0").exists():
        quiet["DS_ACCELERATOR"] = "cpu"
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            cwd=ROOT,
            env=os.environ | quiet,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        return Finding(subject, "bad", f"no end after {timeout_s:.0f} s", remedy)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
        return Finding(subject, "bad", lines[-1][:200], remedy)
    return Finding(subject, "good", detail or done.stdout.strip().splitlines()[-1])


def check_compiler() -> Finding:
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return Finding(
        "C compiler",
        "good" if found else "bad",
        found or "none",
        "install one, e.g. apt-get install build-essential: torch and vLLM compile kernels",
    )


def check_memory() -> Finding:
    """Memory that this process may still take, its container's limit included."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return _weigh("memory", free, 5, 8, "free", "end other programs, or lower rollout.count")


def check_shared_memory() -> Finding:
    """Where Ray's object store lives."""
    place = Path("/dev/shm")
    free = shutil.disk_usage(place).free if place.is_dir() else 0
    return _weigh(
        "/dev/shm", free, 0, 2, "free", "docker run --shm-size=4g ...; else Ray uses /tmp"
    )


def check_disk() -> Finding:
    free = min(shutil.disk_usage(place).free for place in (Path.cwd(), tempfile.gettempdir()))
    return _weigh("disk", free, 2, 5, "free here and in the temporary directory", "make room")


def _weigh(
    subject: str, size: int, least_gib: float, ample_gib: float, what: str, remedy: str
) -> Finding:
    gib = size / GIB
    state: State = "good" if gib >= ample_gib else "doubtful" if gib >= least_gib else "bad"
    return Finding(
        subject, state, f"{gib:.1f} GiB {what}", f"better {ample_gib:g} GiB or more: {remedy}"
    )


def check_sockets() -> Finding:
    """Ray's processes talk over TCP on this machine's own address."""
    address = socket.gethostname()
    try:
        address = socket.gethostbyname(address)
        with socket.create_server((address, 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection((address, port), timeout=5).close()
    except OSError as error:
        return Finding(
            "sockets", "doubtful", f"{address}: {error}", "let the host name resolve in /etc/hosts"
        )
    return Finding("sockets", "good", f"can listen and connect on {address}")


def check_open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Finding(
        "open files",
        "good" if soft >= 4096 else "doubtful",
        f"limit {soft} (hard {hard})",
        "ulimit -n 65536",
    )


def check_confinement() -> Finding:
    """Whether completions that are programs can be run: align.reward.source=code."""
    from raylign.rewards.confinement import survey_walls

    walls = survey_walls()
    return Finding(
        "code rewards",
        "good" if walls.complete else "doubtful",
        f"confined by {walls}" if walls.complete else f"cannot be confined: {walls}",
        "Linux 5.13 or later on x86-64 or ARM64, both enabled; nothing else needs them",
    )


def check_cluster() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Finding("Ray", "good", f"{find_version('ray')}, a private cluster for each job")
    return Finding(
        "Ray",
        "doubtful",
        f"RAY_ADDRESS={address}: jobs join that cluster",
        "unset RAY_ADDRESS for a private one",
    )


def check_gpu() -> Finding:
    count = len(list(Path("/dev").glob("nvidia[0-9]*")))
    if not count:
        return Finding("GPU", "good", "none; CPU engines")
    idle = (find_version("torch") or "").endswith("+cpu")
    return Finding(
        "GPU",
        "doubtful" if idle else "good",
        f"{count}" + (", unused by this CPU installation" if idle else ""),
        "a second environment: pip install '.[gpu]'",
    )


def prove_engine() -> None:
    """Have vLLM serve a random model, and compare its log-probabilities with transformers'."""
    import torch

    from raylign.config import ModelConfig
    from raylign.inference.generator import Sampling, build_generator, generate
    from raylign.models.loading import initialise, load_model, pad_id, save_model
    from raylign.models.logprobs import score_tokens
    from raylign.models.presets import build_config
    from raylign.tokenization.train import train_bpe

    tokenizer = train_bpe([Path(__file__).read_text(encoding="utf-8")], vocab_size=300)
    shape = ModelConfig(layers=2, context=64)
    config = build_config(
        shape, len(tokenizer), pad_id=pad_id(tokenizer), eos_id=tokenizer.eos_token_id
    )
    prompt = tokenizer.encode("What is 12 + 7?")
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory)
        save_model(initialise(config, seed=0), config, tokenizer, model)
        engine = build_generator(
            "vllm",
            model,
            dtype="float32",
            max_length=64,
            kv_cache_mb=64,
            max_sequences=4,
            threads=1,
            seed=0,
        )
        sample = generate(engine, [prompt], Sampling(max_tokens=16))[0][0]
        tokens = torch.tensor([[*prompt, *sample.token_ids]])
        scores = score_tokens(load_model(model), tokens)[0][0, len(prompt) :].detach()
        engine.close()
    gap = float((scores - torch.from_numpy(sample.logprobs)).abs().max())
    if gap > 1e-3:
        raise ArithmeticError(f"vLLM's log-probabilities are off by {gap:.2g}")
    sys.stdout.write(
        f"vLLM sampled {len(sample.token_ids)} tokens; log-probabilities within {gap:.0e}\n"
    )


if __name__ == "__main__":
    main()
