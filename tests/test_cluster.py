"""Runs whose chunks are computed by the actors of a Ray cluster."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from robustbench_lite import cli, registry
from robustbench_lite.cluster import LOCAL, Cluster, _Bench
from robustbench_lite.models import build
from robustbench_lite.pool import Lost, packed
from robustbench_lite.trained import save
from tests.outcomes import Notes
from tests.test_workers import PLUGINS, bench, tables, until

pytest.importorskip("ray")
pytestmark = pytest.mark.xdist_group("ray")


@dataclass(frozen=True)
class Job:
    """What to do with a number."""

    number: int
    what: str = "square"
    where: str = ""
    seconds: float | None = None
    group: int = 0


def begin(worker: int) -> Any:
    import os
    import signal
    import time

    def work(job: Job) -> Any:
        if job.what == "refuse":
            raise ValueError(f"{job.number} is no number for worker {worker}")

        def compute() -> int:
            if job.what == "refuse late":
                raise ValueError(f"{job.number} comes out\nwrong")
            if job.what == "sleep":
                time.sleep(600)
            if job.what == "die once" and not Path(job.where).exists():
                Path(job.where).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return job.number**2

        return compute

    return work


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


@pytest.mark.usefixtures("settled")
def test_every_task_is_answered_or_lost(tmp_path: Path):
    jobs = [Job(3), Job(4, "die once", str(tmp_path / "died")), Job(5, "sleep", seconds=0.5), Job(6), Job(7, group=1)]
    with Cluster[Job, int](begin, LOCAL, 2, 1, False) as cluster:
        answers = {job.number: answer for job, answer in cluster.run(jobs)}
        assert {number: answers[number] for number in (3, 6, 7)} == {3: 9, 6: 36, 7: 49}
        died, late = answers[4], answers[5]
        assert isinstance(died, Lost)
        assert not died.stopped
        assert late == Lost("no answer within 0.5 s", stopped=True)
        assert [answer for _, answer in cluster.run([jobs[1]])] == [16]
        with pytest.raises(ValueError, match="8 is no number for worker"):
            [*cluster.run([Job(8, "refuse")])]


def test_what_is_wrong_in_an_actor_is_told_in_one_line():
    bench = _Bench(packed(begin), 0)
    assert bench.prepare(packed(Job(8, "refuse"))).wrong == "8 is no number for worker 0"
    assert bench.prepare(packed(Job(9, "refuse late"))).wrong == ""
    assert bench.compute().wrong == "9 comes out wrong"


def test_two_actors_change_no_byte_and_one_that_is_killed_is_replaced(
    place: Path, settled: None, monkeypatch: pytest.MonkeyPatch
):
    import os
    import signal

    Path("plugins.py").write_text(PLUGINS)
    registry.load_file(Path("plugins.py"))
    weights = place / "mlp.safetensors"
    save(build("mlp", (1, 8, 8), 10), weights)
    alone = bench(weights, "careful:evil=hang", "pgd:steps=3", out="alone")
    Path("evil").touch()

    def kill() -> None:
        until(lambda: Path("pid").exists() and Path("pid").read_text())
        Path("evil").unlink()
        os.kill(int(Path("pid").read_text()), signal.SIGKILL)

    killer, watcher = threading.Thread(target=kill), Notes()
    killer.start()
    shared = bench(
        weights, "careful:evil=hang", "pgd:steps=3", out="shared", ray=LOCAL, workers=2, batch=100, watcher=watcher
    )
    killer.join()
    assert tables(alone) == tables(shared)
    assert any("its actor died" in note and "tried again" in note for note in watcher.notes)


def test_a_cluster_that_is_not_there_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        "sys.argv", ["robust-bench", "--attack", "fgsm", "--defense", "standard", "--n", "5", "--ray", "127.0.0.1:1"]
    )
    assert cli.main() == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("robust-bench: error: there is no Ray cluster at 127.0.0.1:1: ")
