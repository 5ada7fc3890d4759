"""Parts of the benchmark of a GPU in processes of their own: what they measured is kept, however they end."""

import io
import json
import sys

import pytest

from detrlib.benchmarks import gpu
from detrlib.errors import ConfigError, DetrlibError

PROGRAM = """
import json, sys, time
name = sys.argv[1]
if name == "gone":
    sys.exit(2)
sys.stdin.readline()
with open(sys.argv[2] + "/gpu.jsonl", "a") as file:
    file.write(json.dumps({"part": name, "result": "weights", "ok": name != "wrong"}) + "\\n")
time.sleep(100 if name == "hangs" else 0)
sys.exit(3 if name == "breaks" else 0)
"""


@pytest.fixture
def parts(monkeypatch):
    """Processes that measure one row, in place of those of the benchmark."""

    def start(part, out, device, log):
        words = [sys.executable, "-c", PROGRAM, part.name, str(out)]
        return gpu.subprocess.Popen(words, stdin=gpu.subprocess.PIPE, stdout=log, stderr=log, text=True)

    monkeypatch.setattr(gpu, "start", start)

    def parts(*stages, seconds=60.0):
        return tuple(tuple(gpu.Part(name, name.title(), seconds) for name in stage) for stage in stages)

    return parts


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="gpu"):
        gpu.main(tmp_path)


def test_all_parts_are_measured_and_written(parts, tmp_path, capsys):
    gpu.measure_parts(tmp_path, "cpu", parts(("one", "two"), ("three",)))
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert [part["part"] for part in written["parts"]] == ["One", "Two", "Three"]
    assert all(part["rows"] == [{"result": "weights", "ok": True}] for part in written["parts"])
    assert written["environment"]["device"] == "cpu" and "## Three" in (tmp_path / "gpu.md").read_text()
    assert "all 3 results are right" in capsys.readouterr().out


def test_parts_that_are_wrong_or_break_or_hang_leave_the_others_and_are_named(parts, tmp_path, capsys):
    with pytest.raises(DetrlibError, match="1 of 4 results are wrong, 3 rows could not be measured"):
        gpu.measure_parts(
            tmp_path, "cpu", (*parts(("wrong", "breaks", "gone")), *parts(("hangs",), seconds=6.0), *parts(("one",)))
        )
    rows = {part["part"]: part["rows"] for part in json.loads((tmp_path / "gpu.json").read_text())["parts"]}
    assert rows["Gone"] == [{"fault": "ended with code 2, see gpu.log"}]
    assert rows["Breaks"][1] == {"fault": "ended with code 3, see gpu.log"}
    assert rows["Hangs"][1:] == [{"fault": "stopped after 6 s"}] and rows["One"] == [{"result": "weights", "ok": True}]


def test_when_the_time_of_all_is_over_the_rest_is_not_measured(parts, tmp_path):
    with pytest.raises(DetrlibError, match="0 of 0"):
        gpu.measure_parts(tmp_path, "cpu", parts(("one",)), limit=0)


def test_a_part_keeps_its_rows_when_it_fails(monkeypatch, tmp_path):
    from detrlib.benchmarks import training

    def failing(device):
        yield {"device": device}
        raise ValueError("no\nmore")

    monkeypatch.setattr(training, "count_waits", failing)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    gpu.measure_part("training.count_waits", tmp_path, "cpu")
    assert gpu.report.read(tmp_path / gpu.ROWS, "training.count_waits") == [
        {"device": "cpu"},
        {"fault": "ValueError: no"},
    ]


def test_every_part_is_a_function_of_this_folder():
    from detrlib.benchmarks import kernels, training

    modules = {"kernels": kernels, "training": training}
    names = [part.name.split(".") for stage in gpu.STAGES for part in stage]
    assert all(callable(getattr(modules[module], function)) for module, function in names)
    times = sum(max(part.seconds for part in stage) for stage in gpu.STAGES[:-1])
    assert times < 500 and gpu.SECONDS <= 360
