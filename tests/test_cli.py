"""The command line: wrong input is one line and exit code 2, and leaves nothing behind."""

from pathlib import Path

import pytest

from dist_gsl import kernels
from dist_gsl.cli import main
from dist_gsl.training.path import PathConfig


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "dec3-char"], "no recipe is called 'dec3-char'; did you mean dec3-chars?"),
        (["train", "dec3-chars", "--train.epoch", "3"], "did you mean train.epochs?"),
        (["train", "dec3-chars", "--train.epochs", "x"], "--train.epochs"),
        (["train", "dec3-chars", "--train.epochs", "0"], "error: train.epochs is 0, must be at least 1"),
        (["train", "dec3-chars", "--penalty.alpha.rest", "1.5"], "alpha is 1.5, must lie in [0, 1]"),
        (["train", "dec3-chars", "--penalty.beta.rest", "-1"], "beta is -1.0, must be a finite number >= 0"),
        (["train", "dec3-chars", "--workers.num", "64"], "64 workers need 64 CPUs, this machine has"),
        (["train", "dec3-chars", "--workers", "50:64"], "50 workers need 50 CPUs, this machine has"),
        (["train", "dec3-chars", "--workers", "2-8"], "--workers '2-8' must be a number of processes such as 4, or the fewest and the most such as 2:8"),
        (["train", "dec3-chars", "--workers", "8:2"], "workers.min is 8, must be from 1 to workers.num 2"),
        (["train", "dec3-chars", "--train.on-divergence", "pray"], "train.on_divergence is 'pray', must be one of stop, back"),
        (["train", "dec3-chars", "--data.dir", "nowhere"], "nowhere"),
        (["train", "dec3-chars", "--data.source", "chairs"], "unknown data source 'chairs'"),
        (["train", "dec8-imagenet-gs"], "needs a folder"),
        (["train", "digits", "--resume"], "--resume needs the --name"),
        (["train", "digits", "--resume", "--name", "never"], "there is no run 'never'"),
        (["train", "digits", "--name", "a/b"], "must be a plain name"),
        (["train", "digits", "--baseline", "--baseline-run", "x"], "not both"),
        (["train", "digits", "--train.loss", "square"], "use --train.loss cross-entropy"),
        (["train", "digits", "--penalty.reference-layer", "conv9"], "'conv9' is no layer with neurons"),
        (["train", "digits", "extra"], "'extra' is neither a field nor an option"),
        (["train", "digits", "--target", "neurons=150%"], "train.target is 'neurons=150%', must be above 0 and below 100"),
        (["train", "digits", "--target", "small"], "train.target is 'small', must say what may be left"),
        (["train", "digits", "--target", "macs=50%", "--penalty.beta.rest", "0"], "set a penalty.beta to start from"),
        (["train", "digits", "--init", "nowhere.pt"], "nowhere.pt: no such file; name a run's folder, a checkpoint, or a file of weights"),
        (["train", "digits", "--init", "s3://bucket/weights.pt"], "train.init: s3://bucket/weights.pt is a URI; copy it to a path"),
        (["train", "digits", "--train.optimizer", "adam"], "train.optimizer is 'adam', must be one of sgd, adamw"),
        (["train", "digits", "--train.optimizer", "adamw", "--train.nesterov", "False"], "penalty.unit epochs counts steps of SGD"),
        (["train", "vit-digits", "--train.adam-betas", "0.9"], "train.adam_betas is (0.9,), must be two numbers in [0, 1)"),
        (["train", "vit-digits", "--network.batch-norm", "True"], "vit-mini normalises over channels"),
        (["train", "digits", "--train.shrink-multiple-of", "0"], "train.shrink_multiple_of is 0, must be at least 1, or left out"),
        (["train", "nowhere/config.yaml"], "config nowhere/config.yaml: cannot be read"),
        (["train", "--from-trial", "nowhere/3"], "is not a search's folder"),
        (["train", "digits", "--from-trial", "a/3"], "is not a search's folder"),
        (["train"], "name a recipe or a config.yaml"),
        (["tune"], "name a space or a .py file"),
        (["tune", "smok"], "no space is called 'smok'; did you mean smoke?"),
        (["tune", "nowhere/mine.py"], "there is no space file nowhere/mine.py"),
        (["tune", "smoke", "--trials", "0"], "--trials is 0, must be at least 1"),
        (["tune", "smoke", "--searcher", "oracle"], "--searcher is 'oracle', must be one of optuna, random, grid"),
        (["tune", "smoke", "--objective", "beauty"], "--objective is 'beauty', must be one of neurons, latency"),
        (["tune", "smoke", "--searcher", "grid"], "a grid cannot hold penalty.beta.rest"),
        (["tune", "smoke", "--resume"], "--resume needs the --name"),
        (["tune", "smoke", "--resume", "--name", "never"], "there is no search 'never'"),
        (["tune", "smoke", "--name", "a/b"], "must be a plain name"),
        (["tune", "smoke", "--train.epoch", "3"], "did you mean train.epochs?"),
        (["tune", "smoke", "--workers.num", "64"], "64 workers need 64 CPUs, this machine has"),
        (["tune", "smoke", "--max-concurrent", "0"], "--max-concurrent is 0, must be at least 1"),
        (["tune", "smoke", "extra"], "'extra' is neither a field nor an option"),
        (["data", "check", "nothing.beton"], "nothing.beton is missing"),
        (["data", "write", "chairs", "out"], "unknown data source 'chairs'"),
        (["compact", "nowhere"], "nowhere is not a run's folder"),
        (["report", "nowhere"], "nowhere is not a run's folder"),
        (["evaluate", "nowhere", "a.png"], "nowhere is not a run's folder"),
        (["bench", "nowhere"], "nowhere is not a run's folder"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1
    assert [p for p in tmp_path.rglob("*") if p.parts[len(tmp_path.parts)] != "data"] == []  # embedded data may be made


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ('{"penalty.beta.rset": Float(0.5, 2)}', "no field is called 'penalty.beta.rset'; did you mean penalty.beta.rest?"),
        ('{"penalty.beta.rest": Float(2, 0.5)}', "is an empty range"),
        ('{"penalty.alpha.rest": Float(0, 1.5)}', "penalty.alpha.rest = 1.5: penalty: alpha is 1.5, must lie in [0, 1]"),
    ],
)
def test_a_wrong_space_is_refused_before_anything_starts(
    space: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from dist_gsl.recipes import find\nfrom dist_gsl.tuning import Float\n"
        f'def base(): return find("digits")\ndef space(): return {space}\n'
    )
    assert main(["tune", "mine.py"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["mine.py"]


def test_a_foreign_data_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "holiday.beton"
    file.write_bytes(b"not a beton" * 100)
    assert main(["data", "check", str(file)]) == 2
    assert "is not a beton" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["data", "--help"], ["data", "write", "--help"], ["report", "--help"]]
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "dist-gsl" in capsys.readouterr().out


def test_a_missing_compiled_step_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels.cpu, "MODULE", "_dist_gsl_nowhere")
    kernels.cpu.library.cache_clear()
    try:
        assert main(["train", "digits", "--runs", str(tmp_path / "runs"), "--data.dir", str(tmp_path / "data"), "--no-tracking"]) == 1
    finally:
        kernels.cpu.library.cache_clear()
    assert capsys.readouterr().err.startswith("dist-gsl: error: the proximal step _dist_gsl_nowhere is missing: install the same dist_gsl here")
    assert list(tmp_path.iterdir()) == []


def test_help_lists_the_recipes_and_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    assert "dec8-768-places2-sgl" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "digits", "--help"])
    assert "--penalty.beta.rest" in capsys.readouterr().out


def test_help_lists_the_spaces_and_their_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--help"]) == 0
    text = capsys.readouterr().out
    assert "imagenet_bnet_c" in text
    assert "--max-accuracy-drop" in text
    words = " ".join(text.split())  # written out in the help, which has no time to load what knows these two
    assert f"with each strength of the penalty ({PathConfig.step_epochs})" in words
    assert f"from there to its network ({PathConfig.finish_epochs})" in words
    with pytest.raises(SystemExit):
        main(["tune", "smoke", "--help"])
    assert "--train.epochs" in capsys.readouterr().out


def test_unknown_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["trian"], ["compact", "runs/x", "--frce"], []):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
