"""A soak: the smallest runs, of random settings, are disturbed at random and go on until they are finished.

    python tests/soak.py --minutes 60                       an hour of cases; --cases 20: so many
    python tests/soak.py --seed 7 --cases 1 --only kill     one case again; of these disturbances alone

A case is one run in 1 to 3 rounds: it starts, something disturbs it at some step, something may happen to its files
while it is down, and the same command goes on. In the end it must equal the run that nothing has disturbed: all of
last.pt, predictions.json, results.json and metrics.jsonl but what a clock has measured. Or it says in one line why it
does not go on, which it may only where its last checkpoint was damaged and there was none before it. No process, lock
or temporary file may be left, and no traceback be printed.

Everything that is drawn follows from the seed of the case; the moment at which something hits depends on the machine
too. Failures keep their folder. As root, the disk that gets full is a small one in memory, otherwise files may not
grow (RLIMIT_FSIZE). Not collected by pytest: it takes as long as it is given.
"""

import argparse
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import get_args

import torch

from detrlib.config import PROJECT, Shapes
from detrlib.config.attention import QueryTransformName, SiteName, TransformName
from detrlib.data.shapes import shapes_folder
from detrlib.errors import STOPPED
from detrlib.files import load_checkpoint, one_at_a_time
from detrlib.runs.owner import OWNER

SETTINGS = {
    "data": {"image_size": 64},
    "model": {"backbone": {"name": "tiny", "weights": "none"}, "hidden_dim": 32, "num_heads": 4, "encoder_layers": 1}
    | {"decoder_layers": 2, "feedforward_dim": 32, "num_queries": 10},
    "train": {"epochs": 3, "batch_size": 8, "lr": 1e-3, "lr_backbone": 1e-3, "log_every": 1},
    "evaluate": {"examples": 2},
}
STEPS = 3 * 5  # of 40 images
TWO_STAGES = {"levels": 2, "stages": [4], "refine": True, "two_stage": True}
FAMILIES = {
    "detr": {},
    "pnp": {"polling": {"ratio": 0.333, "pooled": 4}},
    "deformable": {"architecture": "deformable", "deformable": {"levels": 2, "stages": [4]}},
    "sparse": {"architecture": "deformable", "deformable": TWO_STAGES | {"rho": 0.5, "encoder_auxiliary": True}},
}
SIGNALS = [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
CLOCKED = {"extra/iter_time", "extra/data_time", "extra/memory_mb"}
MARK = "DETRLIB_SOAK"  # environment variable by which processes of a case are found, wherever they have got to
DISK = 128 * 2**20  # bytes; a run wants about 40 MB free


ENVIRONMENT = dict(os.environ, CUDA_VISIBLE_DEVICES="", ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
ENVIRONMENT |= {"PYTHONPATH": str(PROJECT), "PYTHONFAULTHANDLER": "1"}  # which tells where a process hangs


class Fault(Exception):
    """What a case has shown to be wrong."""


def configuration(number: int) -> tuple[str, dict, int]:
    """The settings of a number, what they are in words, and how many processes train."""
    draw = Random(f"configuration {number}")
    family = draw.choice(list(FAMILIES))
    site = draw.choice(get_args(SiteName)) if family in ("detr", "pnp") else "decoder_self"
    names = TransformName if family == "detr" and site != "decoder_self" else QueryTransformName
    transform = draw.choice(get_args(names))
    attention = {site: transform}
    if transform == "topk":
        attention["topk"] = 8
    if transform in ("sparsemax", "entmax15", "entmax") and draw.random() < 0.7:
        attention["anneal"] = {"epochs": 1.5, "sites": [site]}
    train = {"ema": draw.choice([0.0, 0.9]), "micro_batch": draw.choice([None, 3])}
    train["save_minutes"] = draw.choice([0.0, 0.005])
    data = {"workers": draw.choice([0, 1]), "augment": draw.choice(["none", "flip", "detr"])}
    chosen = {"model": FAMILIES[family] | {"attention": attention}, "train": train, "data": data}
    settings = {name: section | chosen.get(name, {}) for name, section in SETTINGS.items()}
    processes = draw.choice([1, 2])
    words = [family, site, transform, *["annealed"] * ("anneal" in attention), f"processes {processes}"]
    words += [f"{name} {value}" for name, value in (train | data).items() if value]
    return " ".join(words), settings, processes


class Run:
    """A run in a folder of its own, which the same command begins and goes on with."""

    def __init__(self, folder: Path, number: int, source: Path, limit: float):
        _, settings, self.processes = configuration(number)
        self.folder, self.disk, self.path, self.limit = folder, folder / "disk", folder / "disk" / "run", limit
        self.log, self.output, self.starts, self.first_step = folder / "output.txt", "", 0, 0.0
        self.data = folder / "data-0"
        shutil.copytree(source, self.data)
        (folder / "config.yaml").write_text(json.dumps(settings))  # which is YAML too
        (folder / "tmp").mkdir()
        self.disk.mkdir()
        if os.geteuid() == 0:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "soak", self.disk]
            subprocess.run(mount, stderr=subprocess.DEVNULL)  # not in every container

    def close(self) -> None:
        """Put the run where it stays, and let go of the disk."""
        self.end()
        if self.disk.is_mount():
            shutil.copytree(self.disk, self.folder / "kept")
            subprocess.run(["umount", "-l", self.disk], check=True)
            self.disk.rmdir()
            (self.folder / "kept").rename(self.disk)

    def open(self) -> subprocess.Popen:
        """Start the command."""
        command = [sys.executable, "-m", "detrlib", "train", self.folder / "config.yaml", "--name", self.path]
        command += ["--processes", str(self.processes), "--set", f"data.root={self.data}"]
        own = {MARK: self.folder, "TMPDIR": self.folder / "tmp", "DETRLIB_CACHE": self.folder / "cache"}
        with self.log.open("ab") as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            return subprocess.Popen(command, cwd=PROJECT, env=ENVIRONMENT | own, start_new_session=True, **streams)

    def start(self, disturb: Callable | None = None, after: float = 0.0) -> int:
        """Start the command, call `disturb` after a share of what is left, and wait until all processes are gone.

        Returns the exit code; raises Fault where they do not go, or a traceback is printed.
        """
        self.starts += 1
        with self.log.open("a") as log:
            log.write(f"--- start {self.starts}\n")
            begin = log.tell()
        process, began, before = self.open(), time.monotonic(), self.step()
        aim = before + round(after * (STEPS - before))
        moment = self.first_step * after / 0.2 if after < 0.2 else None  # before the first step
        while process.poll() is None and time.monotonic() - began < self.limit:
            seconds, step = time.monotonic() - began, self.step()
            if not self.first_step and step:
                self.first_step = seconds
            if disturb and (seconds >= moment if moment is not None else step >= max(aim, before + 1)):
                disturb(self, process)
                disturb, began = None, time.monotonic()
            time.sleep(0.01)
        while (left := self.processes_left()) and time.monotonic() - began < self.limit:
            time.sleep(0.1)
        self.output = self.log.read_bytes()[begin:].decode(errors="replace")
        if left:
            self.end()
            raise Fault(f"{len(left)} processes were still there after {self.limit:.0f} s")
        if "Traceback (most recent call last)" in self.output:
            raise Fault("a traceback was printed")
        return process.wait()

    def processes_left(self) -> list[int]:
        """The processes that the command has started, itself included."""
        mark, found = f"{MARK}={self.folder}\0".encode(), []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # gone meanwhile
                if mark in path.read_bytes():
                    found.append(int(path.parent.name))
        return sorted(found)

    def end(self) -> None:
        """End processes that hang; where they do is printed into the log by Python."""
        for number in (signal.SIGABRT, signal.SIGKILL):
            for process in reversed(self.processes_left()):  # those first whose output others pass on
                with suppress(ProcessLookupError):
                    os.kill(process, number)
                time.sleep(1)

    def step(self) -> int:
        """The last step that was logged."""
        with suppress(OSError, ValueError, IndexError, KeyError, TypeError):
            return json.loads((self.path / "metrics.jsonl").read_bytes().splitlines()[-1])["global_step"]
        return 0

    def line(self) -> str:
        """The line in which the command has said what is wrong, or nothing."""
        return next((line for line in self.output.splitlines() if line.startswith("error: ")), "")


# --- what disturbs a run -----------------------------------------------------------------------------------------


class Disturbance:
    """One of `KINDS`, which hits a start once; `said`: what it was, `sent`: signals, `may_fail`: exit code 1 is due."""

    KINDS = ("signal", "kill", "disk", "second")

    def __init__(self, kind: str, draw: Random):
        self.act, self.draw, self.said, self.sent = getattr(self, kind), draw, "", []
        self.may_fail, self.wrong = kind in ("kill", "disk"), ""

    def __call__(self, run: Run, process: subprocess.Popen) -> None:
        step = run.step()
        self.said = f"{self.act(run, process)} at {step}"

    def send(self, number: int, processes: list[int], send: Callable = os.kill) -> None:
        for process in processes:
            with suppress(ProcessLookupError):
                send(process, number)
                self.sent.append(number)

    def signal(self, run: Run, process: subprocess.Popen) -> str:
        """Once or twice, to the command, its group, or a process that it has started."""
        numbers, target = self.draw.sample(SIGNALS, 2), self.draw.choice(["launcher", "child", "group"])
        pause = self.draw.uniform(0, 4) if self.draw.random() < 0.4 else None
        children = [child for child in run.processes_left() if child != process.pid]
        target = "launcher" if target == "child" and not children else target
        self.may_fail = target == "child"
        chosen = [self.draw.choice(children) if self.may_fail else process.pid]
        send = os.killpg if target == "group" else os.kill
        self.send(numbers[0], chosen, send)
        if pause is None:
            return f"{numbers[0].name} to {target}"
        time.sleep(pause)
        if process.poll() is None:
            self.send(numbers[1], chosen, send)
        return f"{numbers[0].name} and {pause:.1f} s later {numbers[1].name} to {target}"

    def kill(self, run: Run, process: subprocess.Popen) -> str:
        """Any process of the command."""
        there = run.processes_left() or [process.pid]
        chosen = self.draw.choice(there)
        self.send(signal.SIGKILL, [chosen])
        return f"KILL of process {there.index(chosen) + 1} of {len(there)}"

    def disk(self, run: Run, process: subprocess.Popen) -> str:
        """No room is left; where the disk is not a small one of our own, files may not grow."""
        if not run.disk.is_mount():
            for child in run.processes_left():
                resource.prlimit(child, resource.RLIMIT_FSIZE, (2**10, 2**10))
        else:
            with suppress(OSError), (run.disk / "filler").open("wb", buffering=0) as file:
                while file.write(bytes(2**12)):
                    pass
        return "full disk"

    def second(self, run: Run, process: subprocess.Popen) -> str:
        """Another start of the same name, while the processes of the first stand still."""
        first, begin = run.processes_left(), run.log.stat().st_size
        self.send(signal.SIGSTOP, first)
        if not is_locked(run.path / OWNER):  # whichever comes first owns the run
            self.send(signal.SIGCONT, first)
            return "second start too early"
        other = run.open()
        with suppress(subprocess.TimeoutExpired):
            other.wait(run.limit)
        printed = run.log.read_bytes()[begin:].decode(errors="replace")
        if other.poll() != 1 or not any(words in printed for words in ("is in use", "is finished")):
            self.wrong = f"a second start was not refused (exit code {other.poll()})"
            self.send(signal.SIGKILL, [other.pid], os.killpg)
        self.send(signal.SIGCONT, first)
        return "second start"


# --- cases -------------------------------------------------------------------------------------------------------


def reference(folder: Path, number: int, source: Path, limit: float) -> tuple[float, Path]:
    """Of a run that nothing disturbs, made once: after how many seconds its first step was logged, and its folder."""
    kept = folder / f"reference-{number}"
    with one_at_a_time(kept):  # of several soaks in the same folder
        if not (kept / "first_step").exists():
            shutil.rmtree(kept, ignore_errors=True)
            run = Run(kept, number, source, limit)
            try:
                code = run.start()
            finally:
                run.close()
            if code:
                raise Fault(f"the run that nothing disturbs ends with {code}: {run.line()}; see {run.log}")
            (kept / "first_step").write_text(str(run.first_step))
    return float((kept / "first_step").read_text()), kept / "disk" / "run"


def is_locked(path: Path) -> bool:
    """Whether another process holds a lock on a file."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def differences(run: Path, expected: Path, lost: int) -> str:
    """In words, where a run is not as expected, but for so many lines of its log; empty where it is."""
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (run, expected)]
    if odd := sorted(names[0] ^ names[1]):
        return f"files of one alone: {', '.join(odd)}"
    states = [load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (run, expected)]
    if not same(*states):
        return f"last.pt: {[name for name in states[1] if not same(states[0][name], states[1][name])]}"
    if (run / "predictions.json").read_bytes() != (expected / "predictions.json").read_bytes():
        return "predictions.json"
    results = [json.loads((folder / "results.json").read_text()) for folder in (run, expected)]
    odd = [name for name in results[1] if results[0].get(name) != results[1][name]]
    if set(odd) - {"seconds", "crc32"}:
        return f"results.json: {odd}"
    logs = [(folder / "metrics.jsonl").read_text().splitlines() for folder in (run, expected)]
    logs = [[{k: v for k, v in json.loads(line).items() if k not in CLOCKED} for line in log] for log in logs]
    missing = [record for record in logs[1] if record not in logs[0]]
    if len(missing) > lost or logs[0] != [record for record in logs[1] if record not in missing]:
        return f"metrics.jsonl: {len(logs[0])} lines, {len(logs[1])} expected"
    return ""


def same(one: object, other: object) -> bool:
    """Whether two parts of checkpoints are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


class Case:
    """A run in rounds; `said` is what has happened to it, `kinds` what of."""

    def __init__(self, seed: int, given: argparse.Namespace, source: Path):
        self.seed, self.draw, self.given, self.source = seed, Random(f"case {seed}"), given, source
        self.number = self.draw.randrange(given.configurations)
        self.said, self.kinds, self.lost, self.nothing_left = [], [], 0, False

    def play(self) -> str:
        """The outcome: equal, or refused and why. Raises Fault."""
        first_step, expected = reference(self.given.folder, self.number, self.source, self.given.limit)
        folder = self.given.folder / f"case-{self.seed}"
        shutil.rmtree(folder, ignore_errors=True)
        run = Run(folder, self.number, self.source, self.given.limit)
        run.first_step = first_step
        try:
            over = any(self.round(run) == 0 for _ in range(self.draw.randint(1, 3)))
            code = 0 if over else run.start()
            if left := [path.name for path in run.path.rglob(".*")]:
                raise Fault(f"left behind: {left}")
            if code and not (code == 1 and self.nothing_left and run.line()):
                raise Fault(f"exit code {code}: {run.line() or 'nothing said'}")
            if not code and (odd := differences(run.path, expected, self.lost)):
                raise Fault(f"differs from {expected}: {odd}")
        finally:
            run.close()
        shutil.rmtree(folder)
        return f"refused: {run.line()}" if code else "equal"

    def round(self, run: Run) -> int:
        """A start that is disturbed, and what happens while the run is down; the exit code."""
        kind, after = self.draw.choice(self.given.only or Disturbance.KINDS), self.draw.random()
        disturbance = Disturbance(kind, self.draw)
        code = run.start(disturbance, after)
        (run.disk / "filler").unlink(missing_ok=True)
        self.said.append(disturbance.said or f"{kind} too late")
        self.kinds.append(kind)
        foreseen = code in (0, STOPPED, 130) or -code in disturbance.sent
        if disturbance.wrong or not (foreseen or (code == 1 and disturbance.may_fail and run.line())):
            raise Fault(disturbance.wrong or f"exit code {code} after {self.said[-1]}: {run.line() or 'nothing said'}")
        if code and (then := self.draw.choice(["nothing", "damage", "line", "data"])) != "nothing":
            self.said.append(getattr(self, then)(run))
            self.kinds.append(then)
        return code

    def damage(self, run: Run) -> str:
        """last.pt is not what it was."""
        path, draw = run.path / "checkpoints" / "last.pt", self.draw
        if not path.exists():
            return "no last.pt to damage"
        how, content = draw.choice(["bit", "cut", "emptied", "deleted"]), bytearray(path.read_bytes())
        if how == "deleted":
            path.unlink()
        elif content:
            path.unlink()  # previous.pt is the same file where a kill came between its two names
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes({"bit": content, "cut": content[: draw.randrange(len(content))], "emptied": b""}[how])
        self.nothing_left = self.nothing_left or not (path.parent / "previous.pt").exists()
        return f"last.pt {how}"

    def line(self, run: Run) -> str:
        """A line of metrics.jsonl is garbled, or the last one cut short."""
        path = run.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if not lines:
            return "no line to lose"
        number = self.draw.randrange(len(lines))
        half = lines[number][: len(lines[number]) // 2]
        lines[number] = half if number == len(lines) - 1 else half + self.draw.randbytes(9).replace(b"\n", b"") + b"\n"
        path.write_bytes(b"".join(lines))
        self.lost += 1
        return f"line {number + 1} of {len(lines)} lost"

    def data(self, run: Run) -> str:
        """The data lie elsewhere."""
        before, run.data = run.data, run.folder / f"data-{run.starts}"
        before.rename(run.data)
        return "data moved"


def main() -> None:
    """Play cases until the time is over or there were enough; code 1 where one of them has failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="for so long, unless --cases is given")
    parser.add_argument("--cases", type=int, help="so many")
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the next ones count up")
    parser.add_argument("--only", action="append", choices=Disturbance.KINDS, help="these disturbances; several times")
    parser.add_argument("--configurations", type=int, default=100, help="how many there are to draw from")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which a start counts as hanging")
    parser.add_argument("--folder", type=Path, help="for references and failures; default: a new one")
    given = parser.parse_args()
    given.folder = (given.folder or Path(tempfile.mkdtemp(prefix="detrlib-soak-"))).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that disks are let go of
    for number in (signal.SIGINT, signal.SIGHUP):  # a soak in the background may ignore them, which is handed on
        signal.signal(number, signal.default_int_handler)
    source = shapes_folder(Shapes(train=40, val=13, size=64), given.folder)
    print(f"in {given.folder}", flush=True)
    table, seed, until = Counter(), given.seed, time.monotonic() + 60 * given.minutes
    while seed < given.seed + given.cases if given.cases else time.monotonic() < until:
        case, began = Case(seed, given, source), time.monotonic()
        try:
            outcome = case.play()
        except Fault as fault:
            again = f"--seed {seed} --cases 1 --configurations {given.configurations} --folder {given.folder}"
            again += "".join(f" --only {kind}" for kind in given.only or ())
            outcome = f"FAILED: {fault}; kept in {given.folder}/case-{seed}; again: python tests/soak.py {again}"
        words = f"{seed} ({case.number}: {configuration(case.number)[0]}) {' | '.join(case.said)}"
        print(f"{words} -> {outcome}  {time.monotonic() - began:.0f} s", flush=True)
        table.update((kind, outcome.partition(":")[0]) for kind in {*case.kinds, "all cases"})
        seed += 1
    outcomes = ("equal", "refused", "FAILED")
    print("", f"{'':12}" + "".join(f"{outcome:>9}" for outcome in outcomes), sep="\n")
    for kind in sorted({kind for kind, _ in table}):
        print(f"{kind:12}" + "".join(f"{table[kind, outcome]:9}" for outcome in outcomes))
    sys.exit(any(outcome == "FAILED" for _, outcome in table))


if __name__ == "__main__":
    main()
