"""The command line: presets, flags, and one line on stderr with exit code 2 for whatever cannot be met."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

from algos import accel
from common.runs.command import cli
from common.runs.config import RunConfig, UsageError, as_dict, require, require_multiple, require_range


@dataclass(frozen=True)
class Config(RunConfig):
    """Settings of a tiny method."""

    num_envs: int = 8
    """Environments."""
    num_groups: int = 2
    """Groups of them."""
    gamma: float = 0.9
    """Discount."""
    wide: bool = False
    """All at once."""

    def __post_init__(self):
        super().__post_init__()
        require_multiple(self, "num_envs", "num_groups")
        require_range(self, 0, 1, "gamma")


PRESETS = {"cpu": Config(num_envs=4), "paper": Config(preset="paper", num_envs=64, gamma=0.99)}


def parse(*args):
    return cli(Config, "Doc.", PRESETS, list(args))


def error_of(capsys, function) -> str:
    """The one line that a refusal prints."""
    with pytest.raises(SystemExit) as stop:
        function()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.endswith("\n") and err.count("\n") == 1 and "\r" not in err and err.strip(), err
    return err


def test_defaults_without_presets():
    assert cli(Config, "Doc.", args=[]) == Config()


@pytest.mark.parametrize(
    "args, expected",
    [
        ([], PRESETS["cpu"]),
        (["--preset", "cpu"], PRESETS["cpu"]),
        (["--preset", "paper"], PRESETS["paper"]),
        (["--preset=paper"], PRESETS["paper"]),
        (["--gamma", "0.5"], Config(num_envs=4, gamma=0.5)),
        (["--preset=paper", "--num-envs", "6"], Config(preset="paper", num_envs=6, gamma=0.99)),
        (["--num-envs=6", "--preset", "paper", "--wide"], Config(preset="paper", num_envs=6, gamma=0.99, wide=True)),
        (["--no-wide", "--out", "some/folder", "--seed=3"], Config(num_envs=4, out="some/folder", seed=3)),
    ],
)
def test_presets_and_flags(args, expected):
    assert parse(*args) == expected


def test_arguments_come_from_the_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["algos/method.py", "--preset", "paper", "--num-seeds", "3"])
    assert cli(Config, "Doc.", PRESETS) == dataclasses.replace(PRESETS["paper"], num_seeds=3)


@pytest.mark.parametrize(
    "args, words",
    [
        (["--gamma", "1.5"], ["--gamma 1.5", "between 0 and 1"]),
        (["--gamma", "nan"], ["--gamma nan"]),
        (["--seed", "-1"], ["--seed -1", "negative"]),
        (["--num-seeds", "0"], ["--num-seeds 0", "at least 1"]),
        (["--log-every", "0"], ["--log-every 0", "at least 1"]),
        (["--num-updates", "105"], ["--num-updates 105", "--log-every 10", "100 or 110"]),
        (["--eval-every", "5"], ["--eval-every 5", "such as 10"]),
        (["--save-every", "15"], ["--save-every 15", "10 or 20"]),
        (["--num-envs", "7"], ["--num-envs 7", "--num-groups 2", "6 or 8"]),
        (["--num-env", "8"], ["--num-env"]),
        (["--unknown", "8"], ["--unknown"]),
        (["stray"], ["stray"]),
        (["--num-envs", "many"], ["num-envs", "many"]),
        (["--num-envs", "2.5"], ["num-envs", "2.5"]),
        (["--num-envs"], ["num-envs"]),
        (["--gamma", "half"], ["gamma", "half"]),
        (["--wide", "perhaps"], ["perhaps"]),
        (["--preset", "laptop"], ["preset", "laptop"]),
        (["--preset=laptop"], ["preset", "laptop"]),
    ],
)
def test_refusals_are_one_line(capsys, monkeypatch, args, words):
    monkeypatch.setattr("sys.argv", ["algos/method.py", *args])
    line = error_of(capsys, lambda: cli(Config, "Doc.", PRESETS))
    assert line.startswith("method: error: ")
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    "args, words",
    [
        (["--num-envs", "30", "--num-minibatches", "4"], ["--num-envs 30", "--num-minibatches 4", "28 or 32"]),
        (["--preset=paper", "--num-envs=30", "--num-minibatches=4"], ["--num-envs 30", "28 or 32"]),
        (["--gamma", "1.5"], ["--gamma 1.5", "between 0 and 1"]),
        (["--gae-lambda", "-0.1"], ["--gae-lambda -0.1"]),
        (["--lr", "0"], ["--lr 0", "positive"]),
        (["--temperature", "0"], ["--temperature 0"]),
        (["--num-minibatches", "0"], ["--num-minibatches 0", "at least 1"]),
        (["--num-walls", "168"], ["--num-walls 168", "between 0 and 167"]),
        (["--buffer-size", "31"], ["--buffer-size 31", "32"]),
        (["--parallel", "--buffer-size", "95"], ["--buffer-size 95", "96"]),
        (["--score", "regret"], ["score", "regret"]),
        (["--num-updates", "7"], ["--num-updates 7", "such as 10"]),
    ],
)
def test_accel_refusals(capsys, args, words):
    line = error_of(capsys, lambda: cli(accel.Config, accel.__doc__, {"cpu": accel.CPU, "paper": accel.PAPER}, args))
    for word in words:
        assert word in line


def test_accel_presets():
    parse = lambda *args: cli(accel.Config, accel.__doc__, {"cpu": accel.CPU, "paper": accel.PAPER}, list(args))
    assert parse() == accel.CPU and parse("--preset=paper") == accel.PAPER
    assert parse("--preset", "paper", "--hidden", "8", "--parallel") == dataclasses.replace(accel.PAPER, hidden=8, parallel=True)
    assert accel.CPU.split_size == accel.CPU.num_envs


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    out, err = capsys.readouterr()
    assert stop.value.code == 0 and err == ""
    for name in ("--num-envs", "--gamma", "--num-seeds", "Environments", "Doc."):
        assert name in out


def test_a_config_made_in_python_is_checked():
    with pytest.raises(UsageError, match="--num-envs 30"):
        accel.Config(num_envs=30, num_minibatches=4)
    with pytest.raises(UsageError, match="--gamma 1.5"):
        Config(gamma=1.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().gamma = 1.0


def test_require():
    require(True, "fine")
    with pytest.raises(UsageError, match="^wrong$"):
        require(False, "wrong")


def test_as_dict_is_json():
    config = Config(gamma=0.25, out=None, wide=True)
    assert Config(**json.loads(json.dumps(as_dict(config)))) == config
