"""The frame of the command line: which command, its options, failures on one line."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from k_diffusion.cli import app, main
from k_diffusion.cli.problems import Stopped, UsageError, one_line, unboxed
from k_diffusion.training import TrainingError


def failure(capsys, *argv: str) -> tuple[int, str]:
    """The exit code and the one line that it left on stderr; stdout must be empty."""
    code = main(list(argv))
    out, err = capsys.readouterr()
    assert not out
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return code, err[:-1]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            [],
            "k-diffusion: error: a command is missing; one of train, sample, evaluate",
        ),
        (["--sampler", "x"], "k-diffusion: error: '--sampler' stands before the command"),
        (["sampel"], "k-diffusion: error: unknown command 'sampel'; did you mean 'sample'?"),
        (["export", "-o", "x"], "k-diffusion export: error: CHECKPOINT is missing"),
        (["sample", "a", "b"], "k-diffusion sample: error: 'b' is one argument too many"),
        (["sample", "a", "--stepz", "3"], "unknown option '--stepz'; did you mean --steps?"),
        (["sample", "--stepz", "3"], "unknown option '--stepz'; did you mean --steps?"),
        (["sample", "--stepz"], "unknown option '--stepz'; did you mean --steps?"),
        (["sample", "a", "--qqq=1"], "unknown option '--qqq'; --help lists the options"),
        (["sample", "a", "--steps"], "k-diffusion sample: error: --steps is given without a value"),
        (["sample", "a", "--steps", "x"], "error: --steps: 'x' is not a whole number"),
        (["sample", "a", "--steps", "2.5"], "error: --steps: '2.5' is not a whole number"),
        (["sample", "a", "--steps", "0"], "error: --steps is 0; give a whole number of at least 1"),
        (["sample", "a", "--steps", "-1"], "error: --steps is -1; give a whole number of at least"),
        (["sample", "a", "-n", "0"], "error: --number is 0; give a whole number of at least 1"),
        (["sample", "a", "--batch-size", "0"], "error: --batch-size is 0; give a whole number"),
        (["sample", "a", "--seed", "-1"], "error: --seed is -1; give a whole number of at least 0"),
        (["sample", "a", "--class-label", "three"], "--class-label: 'three' is not a class"),
        (["sample", "a", "--class-label", "6-4"], "--class-label: '6-4' counts down; give 4-6"),
        (["sample", "a", "--sampler", "dpmpp2m"], "unknown sampler 'dpmpp2m'; did you mean 'dpmpp"),
        (["sample", "a", "--scheduler", "karas"], "'karas'; did you mean 'karras'?"),
        (["sample", "a", "--sampler-options", "eta"], "'eta' is not of the form name=value"),
        (["sample", "a", "--sampler-options", "etta=1"], "unknown option of dpmpp_2m, 'etta'"),
        (["sample", "a", "--scheduler-options", "roh=1"], "'roh'; did you mean 'rho'?"),
        (["sample", "a", "--device", "gpu"], "error: --device gpu cannot be used here"),
        (["samplers", "--jsn"], "unknown option '--jsn'; did you mean --json?"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_2(capsys, argv, line) -> None:
    code, said = failure(capsys, *argv)
    assert line in said
    assert code == 2


def test_the_terminal_width_does_not_cut_a_message(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    _, said = failure(capsys, "sample", "a", "--class-label", "three")
    assert said == (
        "k-diffusion sample: error: --class-label: 'three' is not a class or a list of classes "
        "such as 3 or 0,1,4-6"
    )


def test_help_goes_to_stdout_and_succeeds(capsys) -> None:
    assert main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert all(f" {name} " in out for name in app.COMMANDS)
    assert not err
    for name in app.COMMANDS:
        assert main([name, "--help"]) == 0
        out, err = capsys.readouterr()
        assert f"usage: k-diffusion {name}" in out
        assert not err


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("k-diffusion 0.")


@pytest.mark.parametrize("given", [None, "7"])
def test_idle_threads_do_not_spin_for_long_unless_asked_to(monkeypatch, given) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", given or "")
    if given is None:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    main(["--version"])
    assert os.environ["GOMP_SPINCOUNT"] == (given or "2000")


def test_help_starts_light() -> None:
    """Help brings in nothing heavy beyond what the package itself does."""
    code = (
        "import sys, k_diffusion; before = set(sys.modules)\n"
        "from k_diffusion.cli import main; main(['sample', '--help'])\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'torch', 'numpy', 'PIL', 'sklearn', 'accelerate', 'pydantic', 'safetensors'}\n"
        "print('brought', sorted(heavy & roots))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.endswith("brought []\n"), done.stdout + done.stderr


def test_as_a_program() -> None:
    program = [sys.executable, "-m", "k_diffusion.cli"]
    done = subprocess.run([*program, "sampel"], capture_output=True, text=True)
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith("k-diffusion: error: unknown command 'sampel'")
    assert done.stderr.count("\n") == 1


def command(action):
    @dataclass
    class Made:
        """Made for a test."""

        def run(self) -> None:
            action()

    return Made


def raising(error: BaseException):
    def action() -> None:
        raise error

    return command(action)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("no"), 2, "k-diffusion made: error: no"),
        (ValueError("one\n  two"), 1, "k-diffusion made: error: one two"),
        (FileNotFoundError(2, "No such file", "a.png"), 1, "error: a.png: No such file"),
        (TrainingError("20 steps"), 1, "k-diffusion made: error: 20 steps"),
        (KeyError("k"), 1, "error: KeyError: 'k' (K_DIFFUSION_TRACEBACK=1 shows where)"),
        (AssertionError(), 1, "error: AssertionError: no message (K_DIFFUSION_TRACEBACK=1"),
        (KeyboardInterrupt(), 130, "k-diffusion made: stopped"),
        (Stopped(15, "kept at 5"), 143, "k-diffusion made: kept at 5"),
    ],
)
def test_every_failure_is_one_line(capsys, monkeypatch, error, code, said) -> None:
    monkeypatch.setitem(app.COMMANDS, "made", raising(error))
    found, line = failure(capsys, "made")
    assert said in line
    assert found == code


def test_the_traceback_can_be_asked_for(capsys, monkeypatch) -> None:
    monkeypatch.setitem(app.COMMANDS, "made", raising(ValueError("no")))
    monkeypatch.setenv("K_DIFFUSION_TRACEBACK", "1")
    assert main(["made"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("k-diffusion made: error: no\n")


def test_sigterm_ends_the_program_with_143(capsys, monkeypatch) -> None:
    kill = command(lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setitem(app.COMMANDS, "made", kill)
    before = signal.getsignal(signal.SIGTERM)
    assert failure(capsys, "made") == (143, "k-diffusion made: stopped")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_long_message_is_cut() -> None:
    assert len(one_line(ValueError("x" * 9999))) == 500


def test_a_message_that_tyro_words_anew_stands_as_it_is() -> None:
    box = "╭─ Anything ─╮\n│ Something is │\n│ off.         │\n│ ──────────── │\n│ Help.   │\n╰──╯"
    assert unboxed(box) == "Something is off."
    assert unboxed(box.replace("Something", "\x1b[91;1mSomething\x1b[0m")) == "Something is off."
    assert unboxed(" Anything \n ------ \n  Something is\n  off.\n  ------\n  Help.\n") == (
        "Something is off."
    )
    assert unboxed("plain text\n") == "plain text"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    code = (
        "import sys; from k_diffusion.cli import app\n"
        "from dataclasses import make_dataclass\n"
        "def run(self):\n"
        "    while True: print('x' * 1000)\n"
        "app.COMMANDS['made'] = make_dataclass('Made', [], namespace={'run': run})\n"
        "sys.exit(app.main(['made']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as program:
        assert program.stdout is not None
        assert program.stderr is not None
        program.stdout.readline()
        program.stdout.close()
        assert program.wait(30) == 0
        assert program.stderr.read() == b""


def test_a_missing_extra_is_named_with_the_way_to_it(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)  # as where it is not installed
    config = tmp_path / "run.toml"
    config.write_text(
        f"total_images = 4\nout = '{tmp_path / 'run'}'\nbatch_size = 2\n"
        "[data]\nsource = 'digits'\n[model]\ntype = 'unet'\nchannels = 8\nhead_channels = 8\n"
    )
    assert main(["train", "--config", str(config)]) == 1
    error = capsys.readouterr().err
    assert "accelerate is not installed: pip install 'k-diffusion[train]'" in error
    assert "Traceback" not in error
