"""What every job does alike: exit statuses, one line for a mistake, nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from jobs.entry import STAGES, locate, locate_start, open_run, perform, section
from raylign.config import AlignConfig, Recipe, SftConfig, UserError
from raylign.run import INTENT, Draft, Run, content_hash, describe_difference
from raylign.tracking import ProgressBoard

ROOT = Path(__file__).resolve().parents[2]

# A job of each kind of ending; `align.reward.source` says which.
FAKE = """
import time
from jobs.entry import main
from jobs.head import watch_head
from raylign.config import UserError
from raylign.runtime import connect

def work(recipe, run, board):
    ending = recipe.align.reward.source
    with run.write("align", {}, {}) as draft:
        (draft.path / "half").write_text("half")
        if ending == "mistake":
            raise UserError("align.steps=1: too few; raise it")
        if ending == "mistake in a worker":
            import ray
            connect()
            def fail():
                raise UserError("align.steps=1: too few; raise it")
            ray.get(ray.remote(fail).remote())
        if ending == "defect":
            raise ZeroDivisionError("oh")
        if ending == "wait on Ray":
            connect()
            watch_head(patience_s=2)
        if ending.startswith("wait"):
            print("waiting", flush=True)
            time.sleep(60)

main("fake", work)
"""


@pytest.fixture
def job(tmp_path: Path):
    """Starts the job above on a recipe's text; its run is `tmp_path/run`."""
    (tmp_path / "fake.py").write_text(FAKE)

    def start(recipe: str, *arguments: str) -> subprocess.Popen[str]:
        (tmp_path / "recipe.yaml").write_text(recipe)
        return subprocess.Popen(
            [sys.executable, "fake.py", "recipe.yaml", *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "PYTHONWARNINGS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit status, and the lines on stderr."""
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr.splitlines()


def test_success_is_0(job, tmp_path: Path) -> None:
    assert end(job("run: run\nalign: {}\n")) == (0, [])
    assert Run(tmp_path / "run").find("align") is not None


@pytest.mark.parametrize(
    ("recipe", "arguments", "line"),
    [
        ("run: run\nalign: {stps: 1}\n", [], "recipe.yaml:2: unknown key 'align.stps'; did you"),
        ("run: run\nalign: {}\n", ["align.steps=few"], "override 'align.steps=few': align.steps='"),
        ("run: run\n", ["redo=sleep"], "redo=sleep: not a stage; choose from synthetic,"),
        ("run: recipe.yaml\nalign: {}\n", [], str(Path("recipe.yaml", ".align.partial"))),
    ],
)
def test_a_users_mistake_is_2_and_one_line(
    job, tmp_path: Path, recipe: str, arguments: list[str], line: str
) -> None:
    status, lines = end(job(recipe, *arguments))
    assert status == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and line in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_2_and_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.quickstart", str(tmp_path / "quikstart.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == (
        f"error: recipe {tmp_path}/quikstart.yaml does not exist; "
        "the shipped recipes are in jobs/recipes/\n"
    )


def test_no_recipe_at_all_shows_the_usage(job) -> None:
    command = [sys.executable, "-c", "from jobs.entry import main; main('sft', None)"]
    for extra, status in (([], 2), (["--help"], 0)):
        done = subprocess.run([*command, *extra], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == status
        assert done.stderr.startswith("usage: python -m jobs.sft RECIPE.yaml [section.key=value")


def test_a_mistake_found_late_leaves_nothing(job, tmp_path: Path) -> None:
    status, lines = end(job("run: run\nalign: {reward: {source: mistake}}\n"))
    assert (status, lines) == (2, ["error: align.steps=1: too few; raise it"])
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_a_mistake_found_in_a_ray_worker_is_one_line_too(job, tmp_path: Path) -> None:
    status, lines = end(job("run: run\nalign: {reward: {source: mistake in a worker}}\n"))
    assert (status, lines) == (2, ["error: align.steps=1: too few; raise it"])
    assert list((tmp_path / "run").iterdir()) == []


def test_a_defect_shows_its_traceback(job, tmp_path: Path) -> None:
    status, lines = end(job("run: run\nalign: {reward: {source: defect}}\n"))
    assert status == 1
    assert lines[0].startswith("Traceback") and lines[-1] == "ZeroDivisionError: oh"
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ending", ["wait", "wait on Ray"])
def test_an_interrupt_is_130_and_leaves_nothing(
    job, tmp_path: Path, number: int, ending: str
) -> None:
    process = job(f"run: run\nalign: {{reward: {{source: {ending}}}}}\n")
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(number)
    started = time.monotonic()
    status, lines = end(process)
    assert (status, lines) == (130, ["interrupted; finished stages are kept, rerun to continue"])
    assert time.monotonic() - started < 20
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_a_head_that_is_gone_is_one_line(job) -> None:
    process = job("run: run\nalign: {reward: {source: wait on Ray}}\n")
    assert process.stdout.readline() == "waiting\n"
    family = psutil.Process(process.pid).children(recursive=True)
    heads = [p for p in family if "gcs_server" in p.name()]
    assert len(heads) == 1
    heads[0].kill()
    status, lines = end(process)
    assert status == 2 and lines[-1].startswith("error: Ray's head at ")
    assert "the same command goes on" in lines[-1]
    assert not psutil.wait_procs(family, timeout=10)[1], "nobody is left waiting"


@pytest.fixture
def board() -> ProgressBoard:
    return ProgressBoard(Console(quiet=True))


def build(run: Run, board: ProgressBoard, calls: list[str], name: str = "sft", **changes) -> None:
    """Perform stage `name`; `calls` collects what was really built."""
    settings = {"sft": {"lr": 0.1, "steps": 3} | changes.get("sft", {}), "seed": 0}

    def write(draft: Draft) -> None:
        calls.append(name)
        (draft.path / "model").write_text(name)

    perform(run, name, settings, changes.get("parents", {"model": "h0"}), board, write)


def test_a_stage_is_built_once(ray_cluster: None, board: ProgressBoard, tmp_path: Path) -> None:
    calls: list[str] = []
    for _ in range(2):
        build(Run(tmp_path), board, calls)
    assert calls == ["sft"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sft": {"lr": 0.2}}, r"was made with sft.lr=0.1, not 0.2; choose another run=..., or "),
        ({"sft": {"clip": 1.0}}, r"was made with sft.clip=None, not 1.0; "),
        ({"parents": {"model": "h1"}}, r"was made with another model; .* redo=sft "),
    ],
)
def test_a_stage_of_other_making_is_not_overwritten(
    ray_cluster: None, board: ProgressBoard, tmp_path: Path, changes: dict, message: str
) -> None:
    calls: list[str] = []
    build(Run(tmp_path), board, calls)
    with pytest.raises(UserError, match=message):
        build(Run(tmp_path), board, calls, **changes)
    assert calls == ["sft"]


def make_journey(run: Run, board: ProgressBoard) -> None:
    """From a corpus to a report, each stage of those before it, and a search beside fine-tuning."""
    made_from = {
        "corpus": (),
        "pretrain": ("corpus",),
        "sft": ("pretrain",),
        "tune": ("pretrain",),
        "merge": (),  # of the directory of weights inside `sft`
        "align": ("sft", "corpus"),
        "report": ("corpus", "pretrain", "sft", "align"),
    }
    for name, parents in made_from.items():
        contents = {parent: run.require(parent, "").manifest.content for parent in parents}
        if name == "merge":
            contents = {"adapter": content_hash(run.root / "sft" / "adapter")}

        def write(draft: Draft, name: str = name) -> None:
            (draft.path / "adapter").mkdir()
            (draft.path / "adapter" / "weights").write_text(name)

        perform(run, name, {"name": name}, contents, board, write)


@pytest.mark.parametrize(
    ("redo", "gone"),
    [
        ("align", {"align", "report"}),
        ("sft", {"sft", "merge", "align", "report"}),
        ("tune", {"tune"}),
        ("corpus", {"corpus", "pretrain", "sft", "tune", "merge", "align", "report"}),
        ("shards", set()),
    ],
)
def test_redo_discards_a_stage_and_all_made_from_it(
    ray_cluster: None, board: ProgressBoard, tmp_path: Path, redo: str, gone: set[str]
) -> None:
    make_journey(Run(tmp_path), board)
    before = {name for name in STAGES if Run(tmp_path).find(name)}
    run = open_run(Recipe(run=tmp_path, redo=redo))
    assert before - {name for name in STAGES if run.find(name)} == gone
    make_journey(run, board)
    assert {name for name in STAGES if run.find(name)} == before


@pytest.mark.parametrize(
    ("damaged", "kept"),
    [
        ("sft", {"corpus", "pretrain"}),  # who was made from it is not known
        ("align", {"corpus", "pretrain", "tune"}),
        ("corpus", {"pretrain", "tune"}),  # comes before, and nobody asked for it
    ],
)
def test_redo_with_a_damaged_stage_goes_by_the_order(
    ray_cluster: None, board: ProgressBoard, tmp_path: Path, damaged: str, kept: set[str]
) -> None:
    make_journey(Run(tmp_path), board)
    (tmp_path / damaged / "manifest.json").write_text("{")
    run = open_run(Recipe(run=tmp_path, redo="sft"))
    there = {name for name in STAGES if (tmp_path / name).exists()}
    assert there == kept | ({damaged} if damaged == "corpus" else set())
    assert run.find("pretrain")


def interrupt(run: Run, board: ProgressBoard, parents: dict[str, str]) -> Path:
    """An unfinished `align`; its draft."""

    def write(draft: Draft) -> None:
        (draft.path / "half").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform(run, "align", {}, parents, board, write, resume=True)
    return run.root / ".align.partial"


def test_redo_discards_what_is_being_made_from_it(
    ray_cluster: None, board: ProgressBoard, tmp_path: Path
) -> None:
    calls: list[str] = []
    for name in ("pretrain", "sft"):
        build(Run(tmp_path), board, calls, name)
    draft = interrupt(
        Run(tmp_path), board, {"model": Run(tmp_path).require("sft", "").manifest.content}
    )
    open_run(Recipe(run=tmp_path, redo="pretrain"))
    assert (draft / INTENT).exists() and (draft / "half").exists()
    open_run(Recipe(run=tmp_path, redo="sft"))
    assert not draft.exists()


def test_what_a_kill_left_in_a_finished_stage_goes(
    ray_cluster: None, board: ProgressBoard, tmp_path: Path
) -> None:
    calls: list[str] = []
    build(Run(tmp_path), board, calls)
    (tmp_path / "sft" / ".checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "sft" / ".intent").write_text("{}")
    build(Run(tmp_path), board, calls)
    assert calls == ["sft"]
    assert {path.name for path in (tmp_path / "sft").iterdir()} == {"manifest.json", "model"}


def test_a_submitted_job_needs_storage_that_outlives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match="give an absolute path on storage that every node sees"):
        open_run(Recipe(run=Path("runs/x")))


def test_a_section_that_is_missing_says_how_to_add_it() -> None:
    recipe = Recipe(align=AlignConfig(steps=3))
    assert section(recipe, "align", AlignConfig).steps == 3
    with pytest.raises(UserError, match=r"no 'sft' section; add one \(`sft: \{\}` takes all"):
        section(recipe, "sft", SftConfig)


def test_an_input_is_the_users_path_or_the_runs_stage(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(
        UserError, match=r"no finished 'corpus' stage; run `python -m jobs.prepare`"
    ):
        locate(run, None, "corpus", "prepare", "align.prompts")
    with run.write("corpus", {}, {}) as draft:
        (draft.path / "x").write_text("x")
    path, content = locate(run, None, "corpus", "prepare", "align.prompts")
    assert (path, content) == (tmp_path / "corpus", content_hash(tmp_path / "corpus"))
    assert locate(run, path, "corpus", "prepare", "align.prompts") == (path, content)
    with pytest.raises(UserError, match=r"align.prompts=/nowhere: no such file or directory"):
        locate(run, Path("/nowhere"), "corpus", "prepare", "align.prompts")


def test_a_model_is_the_users_or_the_runs_own(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with run.write("pretrain", {}, {}) as draft:
        (draft.path / "model").mkdir()
        (draft.path / "model" / "config.json").write_text("{}")
    stage = run.require("pretrain", "pretrain")
    found = locate_start(run, None, "pretrain", "pretrain", "sft.model")
    assert found == (stage.path / "model", stage.manifest.content)
    assert locate_start(run, str(stage.path), "pretrain", "pretrain", "sft.model") == found
    with pytest.raises(UserError, match=r"^sft.model=nowhere: no such file or directory"):
        locate_start(run, "nowhere", "pretrain", "pretrain", "sft.model")


def test_a_run_that_cannot_be_changed_is_named(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.write("shards", {}, {}):
        pass
    (tmp_path / "run" / ".shards.discarded").write_text("in the way")  # root may write anywhere
    with pytest.raises(UserError, match=r"^redo=shards: .*run cannot be changed \(Not a dir.*run="):
        open_run(Recipe(run=run.root, redo="shards"))
    assert run.find("shards")


def test_of_a_list_the_element_that_differs_is_named() -> None:
    sources = [{"kind": "pydoc"}, {"kind": "text", "limit": 3}]
    old = {"settings": {"sources": sources}, "parents": {}}

    def say(sources: list[dict]) -> str:
        return describe_difference(old, {"settings": {"sources": sources}, "parents": {}})

    assert say([sources[0], {"kind": "text", "limit": 4}]) == "sources.1.limit=3, not 4"
    assert say(sources[:1]).startswith("sources.1.kind=text")
