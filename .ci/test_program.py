"""Tests of the program as a user's machine may treat it: chapters 12 to 14 of tokrl.py.

python -m pytest .ci                     all of them
python -m pytest .ci -m "not slow"       without those that start the program
"""

import io
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch

import tokrl
from tokrl import MEASURES, Config

HERE = Path(tokrl.__file__).resolve().parent


def no_constant(name):
    pytest.fail(f"{name} is not JSON")


def read_run(path: Path) -> dict:
    """As another program would, which knows no NaN and no Infinity."""
    return json.loads(path.read_text(), parse_constant=no_constant)


def contents(folder: Path) -> dict:
    """{file name: its bytes}."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fake_run(config: Config, seed: int) -> dict:
    """What train returns, without training."""
    final = {name: 0.25 for name in MEASURES} | {"net_push": 0.5 if config.fork else math.nan}
    curves = {name: [value, value] for name, value in final.items()}
    curves |= {"step": [0, 1], "kl": [math.nan, 0.125]}
    run = {"config": asdict(config), "seed": seed, "curves": curves, "final": final}
    return run | {"samples": "75=  60 x 7+5=12,  40 x 7+5=11 (wrong)"}


@pytest.fixture
def wanted(monkeypatch):
    """Nothing is trained or drawn, fake runs are saved: the arms it was asked for, by label."""
    asked = {}

    def train_missing(arms, seeds, out):
        asked.update(arms)
        for config in arms.values():
            for seed in seeds:
                tokrl.save_run(tokrl.run_path(out, config, seed), fake_run(config, seed))

    monkeypatch.setattr(tokrl, "train_missing", train_missing)
    monkeypatch.setattr(tokrl, "draw_failure_modes", lambda arms, path: path.write_text("drawn"))
    return asked


@pytest.fixture
def never_train(monkeypatch):
    monkeypatch.setattr(tokrl, "train_missing", lambda *_: pytest.fail("it trains"))


# ---- 1. A finished run is its file
ANOTHER = Config("chain", "gspo", "min", "shared", "once", 1, 4, 4, 4, 200, 2e-4, 0.5, 0.0, 0.1)


def test_file_of_a_run_depends_on_each_field(tmp_path):
    base = Config(loss="grpo", transform="orth")
    paths = {tokrl.run_path(tmp_path, base, 0)}
    for f in fields(Config):
        other = replace(base, **{f.name: getattr(ANOTHER, f.name)})
        paths.add(tokrl.run_path(tmp_path, other, 0))
    assert len(paths) == 1 + len(fields(Config))
    assert tokrl.run_path(tmp_path, replace(base, fork=2), 0) in paths, "the task's own fork"


def test_file_of_a_run_depends_on_seed_code_and_torch(tmp_path, monkeypatch):
    paths = {tokrl.run_path(tmp_path, Config(), seed) for seed in (0, 1, 10)}
    with monkeypatch.context() as patch:
        patch.setattr(tokrl, "code_version", lambda: "edited")
        paths.add(tokrl.run_path(tmp_path, Config(), 0))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "another")
        paths.add(tokrl.run_path(tmp_path, Config(), 0))
    assert len(paths) == 5


def test_code_version_sees_the_code_of_both_files_and_no_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(tokrl, "HERE", tmp_path)
    versions = []
    for program, tasks in [("x = 1", "y"), ("x = 1  # one", "y\n"), ("x = 2", "y"), ("x = 1", "z")]:
        (tmp_path / "tokrl.py").write_text(program)
        (tmp_path / "toy_tasks.py").write_text(tasks)
        versions.append(tokrl.code_version.__wrapped__())
    assert versions[0] == versions[1]
    assert len(set(versions)) == 3


def test_off_ignores_at(tmp_path):
    off = [Config(transform="off", at=place) for place in tokrl.PLACES]
    assert len({tokrl.run_path(tmp_path, config, 0) for config in off}) == 1


def test_saved_run_is_plain_json(tmp_path):
    path = tmp_path / "a.json"
    config = Config(fork=0, max_grad_norm=math.inf)
    tokrl.save_run(path, fake_run(config, 3))
    run = read_run(path)
    assert run["config"] == asdict(config) | {"max_grad_norm": "inf"}
    assert run["curves"]["kl"] == [None, 0.125]
    assert run["final"]["net_push"] is None
    assert tokrl.load_run(path) == run
    assert os.listdir(tmp_path) == ["a.json"]
    assert tokrl.load_run(tmp_path / "b.json") is None


def test_full_disk_leaves_what_was_there_and_no_half_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    tokrl.save_run(path, fake_run(Config(), 0))
    before = contents(tmp_path)

    def write_half(self, text):
        self.write_bytes(text[:40].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space"):
        tokrl.save_run(path, fake_run(Config(), 1))
    assert contents(tmp_path) == before


WHOLE = json.dumps(fake_run(Config(), 0))
DAMAGED = {
    "empty": "",
    "half": WHOLE[:200],
    "not text": "\0\ud800",
    "null": "null",
    "list": "[]",
    "other values": '{"config": 3, "curves": [], "final": "x", "samples": 3}',
    "no samples": WHOLE.replace('"samples"', '"x"'),
    "no place": WHOLE.replace('"at"', '"x"'),
    "no steps": WHOLE.replace('"step"', '"x"'),
    "no curve": WHOLE.replace('"learning_tax"', '"x"', 1),
    "no final": "x".join(WHOLE.rsplit("accuracy", 1)),
    "short curve": WHOLE.replace("[0.25, 0.25]", "[0.25]", 1),
    "words": WHOLE.replace("[0.25, 0.25]", '["a", "b"]', 1),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_run_is_named_and_kept(kind, tmp_path, never_train, capsys):
    path = tokrl.run_path(tmp_path, Config(transform="mean", at="rest"), 0)
    path.write_text(DAMAGED[kind], encoding="utf-8", errors="surrogatepass")
    before = contents(tmp_path)
    assert tokrl.main(["--out", str(tmp_path)]) == 2
    says = f"tokrl.py: {path} is not a finished run: delete it to train it again\n"
    assert capsys.readouterr().err == says
    assert contents(tmp_path) == before


def test_somebody_else_s_picture_is_not_overwritten(tmp_path, wanted, capsys):
    picture = tmp_path / "failure-modes.png"
    picture.write_text("mine")
    (tmp_path / "notes.json").write_text("mine, too")
    before = contents(tmp_path)
    assert tokrl.main(["--out", str(tmp_path)]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert not wanted


# ---- 2. The command line
WRONG = [
    ("--lr 0", "lr must be float, 1e-09 to 1e+09; got 0.0"),
    ("--lr inf", "lr must be"),
    ("--lr fast", "--lr"),
    ("--kl inf", "kl must be"),
    ("--clip-eps 0 --loss grpo", "clip_eps must be"),
    ("--clip-eps inf", "seq has no clip"),
    ("--fork 4 --task add", "fork must be at most 3 for add"),
    ("--group-size 1", "group_size must be int, 2 to"),
    ("--steps 0", "steps must be"),
    ("--steps 1e3", "--steps"),
    ("--steps 99999999999999999999999", "steps must be"),
    ("--loss ppo", "gspo"),
    ("--transform max", "orth"),
    ("--at elsewhere", "shared"),
    ("--seeds 3-1", "seeds must be N or A-B, at most a thousand; got '3-1'"),
    ("--seeds -3", "'-3'"),
    ("--seeds 0-", "'0-'"),
    ("--seeds 0-99999999999999999999999", "at most a thousand"),
    ("--stepz 3", "unrecognized"),
    ("runs", "unrecognized"),
    ("--out file", "--out must be a folder"),
    ("--out file/runs", "file/runs"),
]


@pytest.fixture
def in_folder(tmp_path, monkeypatch, never_train):
    """The current folder, which holds a file."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    return tmp_path


@pytest.mark.parametrize("line, says", WRONG)
def test_wrong_command_line_says_in_one_line_what_is_wrong(line, says, in_folder, capsys):
    assert tokrl.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tokrl.py: ")
    assert says in err
    assert err.count("\n") == 1
    assert os.listdir(in_folder) == ["file"]


def test_infinite_limits_are_meant(tmp_path, wanted):
    line = ["--max-grad-norm", "inf", "--clip-eps", "inf", "--loss", "gspo"]
    assert tokrl.main([*line, "--out", str(tmp_path)]) == 0
    assert wanted["on"].max_grad_norm == wanted["on"].clip_eps == math.inf


def test_seed_range():
    assert tokrl.seed_range("3") == [3]
    assert tokrl.seed_range("8-10") == [8, 9, 10]
    assert len(tokrl.seed_range("0-999")) == 1000
    with pytest.raises(ValueError):
        tokrl.seed_range("0-1000")


CHOSEN = {
    "": ["off", "on"],
    "--transform min": ["on"],
    "--transform off --at rest": ["off"],
    "--at shared": ["off", "on at shared"],
    "--transform orth --at rest": ["orth at rest"],
}


@pytest.mark.parametrize("line", CHOSEN)
def test_words_of_the_command_line_choose_the_arms(line, tmp_path, wanted):
    assert tokrl.main([*line.split(), "--out", str(tmp_path)]) == 0
    assert list(wanted) == CHOSEN[line]


def test_every_finished_arm_is_shown_and_the_table_fits_a_screen(tmp_path, wanted, capsys):
    common = ["--seeds", "0-1", "--out", str(tmp_path)]
    tokrl.main(common)
    tokrl.main([*common, "--transform", "shrink", "--at", "shared"])
    tokrl.main([*common, "--transform", "orth", "--steps", "3"])  # another configuration
    out = capsys.readouterr().out
    assert "\nshrink at shared      0.50" in out
    assert out.count("\noff, 100 samples:\n75=  60 x") == 2
    assert max(map(len, out.splitlines())) <= 100 + len(str(tmp_path))


def test_missing_run_is_named_and_the_others_are_shown(tmp_path, wanted, monkeypatch, capsys):
    assert tokrl.main(["--transform", "off", "--out", str(tmp_path)]) == 0
    monkeypatch.setattr(tokrl, "train_missing", lambda *_: None)
    capsys.readouterr()
    assert tokrl.main(["--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert err == "Not finished: on. The same command retries.\n"
    assert "\noff  " in out
    assert "\non  " not in out


# ---- 3. Consoles and settings
@pytest.mark.parametrize("encoding", ["ascii", "cp932", "cp1252", "utf-8"])
def test_no_console_is_too_narrow_for_help_and_table(encoding, tmp_path, wanted, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", console)
    assert tokrl.main(["--fork", "0", "--out", str(tmp_path)]) == 0  # net push: "–"
    with pytest.raises(SystemExit, match="0"):
        tokrl.main(["--help"])  # "1 ± this"
    console.flush()
    text = console.buffer.getvalue().decode(encoding)
    assert "\noff       " in text
    assert "clip outside 1 " in text


def test_output_may_be_closed(tmp_path, wanted, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert tokrl.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "failure-modes.png").exists()
    assert tokrl.main(["--lr", "0"]) == 2


def test_figure_of_all_arms_ignores_the_user_s_settings_and_leaves_them(tmp_path):
    arms = {label: [fake_run(config, 0)] for label, config in tokrl.all_arms(fork=0).items()}
    assert len(arms) == 13
    pictures = [tmp_path / "plain.png", tmp_path / "usetex.png"]
    tokrl.draw_failure_modes(arms, pictures[0])
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30}):
        before = dict(matplotlib.rcParams)
        tokrl.draw_failure_modes(arms, pictures[1])
        assert dict(matplotlib.rcParams) == before
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


# ---- 4. Workers
def test_cores_are_those_that_this_process_may_use(monkeypatch):
    for cores, count in [({3}, 1), (range(8), 8), (range(200), 61)]:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, c=cores: c, raising=False)
        assert tokrl.available_cores() == count
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert tokrl.available_cores() == 1


def test_worker_goes_on_after_a_run_that_fails(tmp_path, monkeypatch, capfd):
    errors = [ValueError("stopped – ü"), RuntimeError("a\nb"), MemoryError(), None]
    jobs = []
    for i in range(len(errors)):
        jobs.append((f"run {i}", asdict(ANOTHER), i, str(tmp_path / f"{i}.json")))

    def train(config, seed, **bar):
        assert config == ANOTHER
        assert bar == {"desc": f"run {seed}", "position": 5}
        print("a reader's print")
        if errors[seed] is not None:
            raise errors[seed]
        return fake_run(config, seed)

    monkeypatch.setattr(tokrl, "train", train)
    monkeypatch.setattr(tokrl, "end_with_parent", lambda: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps([5, jobs]) + "\n"))
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # work changes it
    tokrl.work()
    out, err = capfd.readouterr()
    assert out == "run 0: stopped – ü\nrun 1: a\nrun 2: MemoryError()\n"
    assert err == "a reader's print\n" * 4
    assert os.listdir(tmp_path) == ["3.json"]


@pytest.mark.parametrize("heard", ["", "[0, [["])
def test_worker_whose_parent_died_early_does_nothing(heard, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.StringIO(heard))
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    tokrl.work()
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(os.name == "nt", reason="needs a program that fails")
@pytest.mark.parametrize("seeds", [1, 500])
def test_worker_that_cannot_start_is_reported(seeds, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "false")
    tokrl.train_missing({"off": Config()}, range(seeds), tmp_path)  # 500: more than a pipe holds
    out, err = capsys.readouterr()
    assert out == f"{seeds} runs to train, 0 kept from before\n"
    assert set(err.split("\n")) == {"", "a worker died: killed, or out of memory"}


@pytest.mark.slow
def test_train_needs_no_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert tokrl.train(Config(steps=1, prompts=2), np.int64(3))["seed"] == 3


# ---- 5. The program itself, started as a user would
POSIX = pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell and process groups")
SHORT = "--steps 3 --prompts 2 --out out"
LONG = "--steps 300 --prompts 2 --out out"


@pytest.fixture(scope="session")
def program(tmp_path_factory) -> Path:
    """A copy of the program whose warm start is short, so that these tests are."""
    folder = tmp_path_factory.mktemp("program")
    text = (HERE / "tokrl.py").read_text(encoding="utf-8")
    assert text.count("steps=300") == 1
    (folder / "tokrl.py").write_text(text.replace("steps=300", "steps=3"), encoding="utf-8")
    (folder / "toy_tasks.py").write_bytes((HERE / "toy_tasks.py").read_bytes())
    return folder / "tokrl.py"


def start(command: str, folder: Path, **environment) -> subprocess.Popen:
    """Start a shell's command in a folder, in a process group of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else a background job ignores Ctrl-C
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["env"] = os.environ | {"python": sys.executable} | environment
    return subprocess.Popen(["sh", "-c", command], cwd=folder, start_new_session=True, **pipes)


def finish(process) -> tuple:
    """Status, standard output and error, once all that it started is gone."""
    out, err = process.communicate()
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    return process.returncode, out, err


def until_training(process):
    """Wait until a worker shows its bar."""
    seen = ""
    while "seed 0:" not in seen:
        character = process.stderr.read(1)
        assert character, f"it ended too early: {seen}"
        seen += character


@pytest.fixture(scope="session")
def undisturbed(program, tmp_path_factory) -> Path:
    """The folder of a command that nothing went wrong with."""
    folder = tmp_path_factory.mktemp("undisturbed")
    status, out, err = finish(start(f"$python {program} {SHORT}", folder))
    assert status == 0, err
    assert out.startswith("2 runs to train, 0 kept from before\n")
    assert out.endswith("\nFigure: out/failure-modes.png\n")
    return folder / "out"


@POSIX
@pytest.mark.slow
def test_default_command_trains_off_and_on(undisturbed):
    runs = [read_run(path) for path in sorted(undisturbed.glob("*.json"))]
    kinds = [run["config"]["transform"] for run in runs]
    assert kinds == ["min", "off"]
    for kind, run in zip(kinds, runs, strict=True):
        assert run["config"] == asdict(Config(steps=3, prompts=2, transform=kind))
        assert run["curves"]["step"] == [0, 1, 2, 3]
    assert len(os.listdir(undisturbed)) == 3


WAYS = {
    "standard error closed": "$python $program $line 2>&-",
    "standard output closed": "$python $program $line >&-",
    "all closed": "$python $program $line <&- >&- 2>&-",
    "link, no docstrings": "ln -s $program link.py; $python -OO link.py $line",
    "unguarded script": "$python script.py",
    "script on standard input": "$python - < script.py",
    "thread": "$python thread.py",
    "two at once": "$python $program $line & $python $program $line; wait",
    "read by head": "PYTHONUNBUFFERED= $python $program $line | head -1",
    "read by head, line by line": "PYTHONUNBUFFERED=1 $python $program $line | head -1",
    "narrow console": "PYTHONIOENCODING=ascii $python $program $line",
}
SCRIPT = """
import sys, threading
sys.path.insert(0, {folder!r})
import tokrl
def target():
    assert tokrl.main({line!r}.split()) == 0
"""
THREAD = "thread = threading.Thread(target=target)\nthread.start()\nthread.join()\n"


@POSIX
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_same_files_whatever_way_it_is_called(way, program, undisturbed, tmp_path):
    script = SCRIPT.format(folder=str(program.parent), line=SHORT)
    (tmp_path / "script.py").write_text(script + "target()\n")
    (tmp_path / "thread.py").write_text(script + THREAD)
    status, _, _ = finish(start(WAYS[way], tmp_path, program=str(program), line=SHORT))
    assert status == 0
    assert contents(tmp_path / "out") == contents(undisturbed)


@POSIX
@pytest.mark.slow
def test_killed_and_given_again_ends_with_the_same_files(program, undisturbed, tmp_path):
    command = f"exec $python {program} {SHORT}"
    process = start(command, tmp_path)
    until_training(process)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    first = next(undisturbed.glob("*-off-*.json"))
    kept = tmp_path / "out" / first.name
    kept.write_bytes(first.read_bytes())  # as if the first run had been finished, for sure
    then = kept.stat().st_mtime_ns
    status, out, _ = finish(start(command, tmp_path))
    assert status == 0
    assert "0 kept" not in out
    assert kept.stat().st_mtime_ns == then
    assert contents(tmp_path / "out") == contents(undisturbed)


@POSIX
@pytest.mark.slow
def test_workers_end_with_their_parent(program, tmp_path):
    process = start(f"exec $python {program} {LONG}", tmp_path)
    until_training(process)
    process.kill()
    finish(process)
    assert os.listdir(tmp_path / "out") == [], "a worker went on and finished its run"


@POSIX
@pytest.mark.slow
def test_ctrl_c(program, tmp_path):
    process = start(f"exec $python {program} {LONG}", tmp_path)
    until_training(process)
    os.killpg(process.pid, signal.SIGINT)  # a terminal's goes to the whole group
    status, _, err = finish(process)
    assert status == 130
    assert err.endswith("\nStopped. The same command continues with what is missing.\n")
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes through /proc")
def test_dead_worker(program, tmp_path):
    process = start(f"exec $python {program} {LONG} --transform off", tmp_path)
    until_training(process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    worker = int(children.read_text().split()[0])
    assert os.getsid(worker) == worker, "a terminal's Ctrl-C would reach it"
    os.kill(worker, signal.SIGKILL)
    status, _, err = finish(process)
    assert status == 1
    assert "\na worker died: killed, or out of memory\nNot finished: off." in err


@POSIX
@pytest.mark.slow
def test_run_that_diverges_is_named_and_the_next_one_trained(program, tmp_path):
    line = "--lr 1e9 --max-grad-norm inf --transform off --seeds 0-2 " + SHORT
    status, out, err = finish(start(f"$python {program} {line}", tmp_path))
    assert status == 1
    assert out == "3 runs to train, 0 kept from before\n"
    for seed in range(3):
        assert err.count(f"off, seed {seed}: stopped at rollout ") == 1
    assert err.endswith("\nNot finished: off. The same command retries.\n")


@POSIX
@pytest.mark.slow
def test_backend_of_a_notebook_that_is_not_installed(program, undisturbed):
    backend = "module://matplotlib_inline.backend_inline"
    command = f"$python {program} {SHORT}"
    status, out, _ = finish(start(command, undisturbed.parent, MPLBACKEND=backend))
    assert status == 0
    assert out.startswith("0 runs to train, 2 kept from before\n")
