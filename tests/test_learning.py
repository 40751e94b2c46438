"""The comparison of methods: each does what its authors say, and the page says what the rows say."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.learning import page, rivals, run
from benchmarks.learning.methods import CONTROL, METHODS, OWN, PART, RIVAL, rival, rows_of
from benchmarks.learning.run import Task
from benchmarks.learning.setting import SETTINGS, Batches, Setting, images_of
from dist_gsl import SparseGroupLasso, create_model, find_neurons
from dist_gsl.neurons import Neurons
from dist_gsl.penalty import row_norms

TINY = SETTINGS["tiny"]


@pytest.fixture(autouse=True, scope="module")
def data_and_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIST_GSL_DATA", str(tmp_path_factory.mktemp("data")))
        images_of.cache_clear()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()
        images_of.cache_clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, data_and_group: None) -> Path:
    """A comparison in which what others go on from is done."""
    made = tmp_path_factory.mktemp("comparison")
    with (made / "rows.jsonl").open("w") as file:
        for name in ("none", "default"):
            for strength in METHODS[name].strengths[:2]:
                file.write(json.dumps(run.work("tiny", made, Task(name, 0, strength))) + "\n")
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", METHODS)
def test_every_method_ends_with_the_network_that_it_tells_of(name: str, folder: Path) -> None:
    method = METHODS[name]
    strength = method.strengths[0]
    outcome = method.trained(TINY, 0, strength, folder)
    whole = {layer.name: layer.num_neurons for layer in rivals.started(TINY, 0)[1]}
    assert outcome.parameters == sum(p.numel() for p in outcome.model.parameters())
    if name != "max-pool-2d":  # a network of its own
        assert set(outcome.widths) == set(whole)
        assert outcome.neurons == pytest.approx(100 * (1 - sum(outcome.widths.values()) / sum(whole.values())))
        for layer, width in outcome.widths.items():
            assert outcome.model.get_parameter(f"{layer}.weight").shape[0] == width, layer
    assert outcome.model(torch.zeros(2, 1, 32, 32)).shape == (2, 36)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["default", "magnitude", "torch-pruning"])
def test_the_same_seed_is_the_same_training(name: str, folder: Path) -> None:
    strength = METHODS[name].strengths[0]
    row = json.loads(json.dumps(run.work("tiny", folder, Task(name, 0, strength))))
    outcome = METHODS[name].trained(TINY, 0, strength, folder)
    assert row["widths"] == outcome.widths
    assert row["val_top1"] == run.top1(outcome.model, TINY, "val")


def test_all_see_the_same_batches_from_the_same_start() -> None:
    a, b = (list(Batches(TINY, 0)) for _ in range(2))
    assert all(torch.equal(x.images, y.images) and torch.equal(x.targets, y.targets) for x, y in zip(a, b, strict=True))
    other = Batches(TINY, 0)
    other.set_epoch(1)
    assert not torch.equal(next(iter(other)).targets, a[0].targets)
    first, second = (rivals.started(TINY, 0)[0].state_dict() for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_course_is_the_demos() -> None:
    config = SETTINGS["small"].config(0)
    schedule = config.penalty.beta_schedule
    assert (schedule.start, schedule.end, config.train.drop_epochs, config.train.epochs) == (1.5, None, (11.0, 14.0), 16)
    assert SETTINGS["small"].cut < config.train.drop_epochs[0]
    assert SETTINGS["large"].config(0).train.drop_epochs == (11 * 45 / 16, 14 * 45 / 16)


def small_network() -> tuple[nn.Module, Neurons]:
    torch.manual_seed(0)
    model = create_model("dec3", num_classes=4, width=1 / 16, batch_norm=True)
    return model, find_neurons(model, torch.zeros(2, 1, 32, 32))


def rows_in(neurons: Neurons) -> dict[str, Tensor]:
    return {layer.name: torch.cat([part.detach().reshape(layer.num_neurons, -1) for part in neurons.parts(layer)], 1) for layer in neurons}


def test_the_gradient_of_the_group_lasso_is_that_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    model, neurons = small_network()
    found: dict[str, Tensor] = {}

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer, *_: Any, regularise: rivals.Regulariser, **__: Any) -> None:
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        regularise()
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    monkeypatch.setattr(rivals, "fit", fit)
    monkeypatch.setattr(rivals, "tuned", lambda *_, **__: None)
    monkeypatch.setattr(rivals, "started", lambda *_: (model, neurons))
    rivals.gradient_group_lasso(TINY, 0, 0.3)
    model, neurons = small_network()
    value = sum(0.3 * math.sqrt(layer.group_size) * row_norms(neurons.parts(layer)).sum() for layer in neurons)
    assert isinstance(value, Tensor)
    value.backward()
    for name, p in model.named_parameters():
        expected = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.allclose(found[name], expected, atol=1e-6), name


def test_what_is_below_the_threshold_is_zero_and_whole_neurons_of_it_go() -> None:
    model, neurons = small_network()
    layer = next(iter(neurons))
    with torch.no_grad():
        for part in neurons.parts(layer):
            part.view(layer.num_neurons, -1)[0] = 0.9 * rivals.L1_THRESHOLD
            part.view(layer.num_neurons, -1)[1, 0] = 0.9 * rivals.L1_THRESHOLD
    outcome = rivals.thresholded(model, neurons)
    assert outcome.widths[layer.name] == layer.num_neurons - 1
    assert all(outcome.widths[other.name] == other.num_neurons for other in neurons if other is not layer)
    assert (row_norms(neurons.parts(layer))[1:] > 0).all()


def test_a_cut_takes_the_lowest_scores_of_the_whole_network_and_leaves_one_in_each_layer() -> None:
    _, neurons = small_network()
    first, *others = neurons
    best_first = -torch.arange(float(first.num_neurons))
    rivals.kill(neurons, {first.name: best_first} | {o.name: torch.arange(float(o.num_neurons)) for o in others}, limit=0.0)
    assert first.alive().tolist() == [True] + [False] * (first.num_neurons - 1)
    assert all(other.alive().tolist() == [False] + [True] * (other.num_neurons - 1) for other in others)


def test_dual_averaging_finds_where_loss_and_penalty_are_least() -> None:
    """On a quadratic function: the closed form is the proximal operator itself."""
    model, neurons = small_network()
    torch.manual_seed(1)
    # Of each layer every other neuron is worth less than the penalty takes.
    targets = [torch.randn_like(p) * torch.linspace(0.02, 0.12, 2).repeat(len(p))[: len(p)].view(-1, *[1] * (p.dim() - 1)) for p in model.parameters()]
    beta = 0.05
    optimizer = rivals.RMDA(model, neurons, SparseGroupLasso(beta=beta), lr=0.1, c=0.1)
    for _ in range(1500):
        for p, target in zip(model.parameters(), targets, strict=True):
            p.grad = (p - target).detach()
        optimizer.step()
    expected_model, expected = small_network()
    with torch.no_grad():
        for p, target in zip(expected_model.parameters(), targets, strict=True):
            p.copy_(target)
        for layer in expected:
            SparseGroupLasso(beta=beta).prox_(expected.parts(layer), layer=layer.name, step=0, t=1.0, group_size=layer.group_size, min_alive=0)
    assert any((rows.norm(dim=1) == 0).any() for rows in rows_in(expected).values())
    for name, rows in rows_in(expected).items():
        assert torch.allclose(rows_in(neurons)[name], rows, atol=5e-3), name


def test_widths_from_scratch_are_started_anew() -> None:
    seen: dict[str, Tensor] = {}

    def look(model: nn.Module, *_: Any, **__: Any) -> None:
        seen.update({name: p.detach().clone() for name, p in model.named_parameters()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rivals, "fit", look)
        outcome = rivals.from_scratch(TINY, 0, {layer.name: layer.num_neurons - 1 for layer in rivals.started(TINY, 0)[1]})
    whole = dict(rivals.started(TINY, 0)[0].named_parameters())
    for name, p in seen.items():
        if name.endswith("weight") and p.dim() == 4:
            assert p.shape[0] == whole[name].shape[0] - 1
            assert float(p.std()) == pytest.approx(math.sqrt(2 / p[0].numel()), rel=0.3), "as the whole network begins"
            assert not torch.isin(p, whole[name]).any()
    assert outcome.parameters < sum(p.numel() for p in whole.values())


def test_a_training_that_fails_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("the loss is not finite\nand more")

    monkeypatch.setitem(METHODS, "l1", METHODS["l1"]._replace(run=fails))
    assert run.work("tiny", tmp_path, Task("l1", 0, 1.0)) == {
        "method": "l1", "seed": 0, "strength": 1.0, "setting": "tiny", "weight_decay": 5e-4, "error": "the loss is not finite",
    }  # fmt: skip


def test_what_is_done_is_not_done_again() -> None:
    first, later = run.tasks_of(["none", "scratch", "sensitivity"], [0, 1], done=[])
    assert first[:2] == [Task("none", 0, 0.0), Task("none", 1, 0.0)]
    assert {task.seed for task in first if task.method == "sensitivity"} == {0}
    assert {task.method for task in later} == {"scratch"}
    again, again_later = run.tasks_of(["none", "scratch", "sensitivity"], [0, 1], done={first[0], later[0]})
    assert again == first[1:]
    assert again_later == later[1:]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(["--only", "init"], "init goes on from what none leaves in .*: add it to --only"), (["--setting", "large"], "holds trainings of the setting 'tiny': name another folder")],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "comparison"
    if "--setting" in arguments:
        folder.mkdir()
        (folder / "rows.jsonl").write_text(json.dumps({**row("none", 0, 0.0, 80.0, 0.0), "setting": "tiny"}) + "\n")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setenv("DIST_GSL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("sys.argv", ["run", str(folder), *arguments])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2
    assert re.fullmatch(f"run: error: .*{reason}\n", capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before


# --- the page


def row(method: str, seed: int, strength: float, top1: float, gone: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method, "seed": seed, "strength": strength, "val_top1": top1, "test_top1": top1 - 1, "neurons": gone, "parameters": 100, "seconds": 10.0, "weight_decay": 5e-4,
        **more,
    }  # fmt: skip


@pytest.fixture
def told() -> dict[str, list[dict[str, Any]]]:
    """Two seeds of a default that is 10 points better than its rival with half of the neurons."""
    rows = [row("none", seed, 0.0, 80.0, 0.0) for seed in (0, 1)]
    rows += [row("default", seed, 2.2, 80.0, 50.0) for seed in (0, 1)] + [row("magnitude", seed, 0.45, 70.0, 50.0) for seed in (0, 1)]
    rows += [row("between", seed, 5.0, 80.0, 25.0) for seed in (0, 1)]
    rows += [row("target", seed, 50, 79.8, 51.0) for seed in (0, 1)] + [row("target", seed, 70, 79.0, 33.0) for seed in (0, 1)]
    rows += [row("init", seed, METHODS["init"].strengths[-1], 81.0, 40.0, course=[79.0, 81.0], start=79.5) for seed in (0, 1)]
    rows += [row("sensitivity", 0, number, 79.0 + number, 40.0 + number) for number in range(3)]
    found: dict[str, list[dict[str, Any]]] = {}
    for each in rows:
        found.setdefault(each["method"], []).append(each)
    return found


def test_the_table_says_who_is_ahead(told: dict[str, list[dict[str, Any]]]) -> None:
    lines = page.table(told, (OWN, RIVAL, CONTROL))
    # (80 - 50) * (100 - 50) for the default, (70 - 50) * 50 for the rival.
    assert [line.split("|")[1].split(":")[0].strip() for line in lines[2:4]] == ["default", "magnitude"]
    assert lines[2].split("|")[3:5] == [" 1500 ± 0 ", " 1.000 ± 0.000 "]
    assert lines[3].split("|")[3:5] == [" 1000 ± 0 ", " 1.500 ± 0.000 "]
    assert lines[2].split("|")[6:9] == [" 0.0 ± 0.0 ", " 80.0 ± 0.0 ", " - "], "50 % is on its front, 40 % beyond"
    assert "80.00 ± 0.00" in page.single_networks(told)[0]
    assert [line.split("|")[-3] for line in lines[2:4]] == [" 50.0 ± 0.0 ", " 100.0 ± 0.0 "], "within a point of the dense network"


def test_accuracies_are_compared_at_the_same_sizes(told: dict[str, list[dict[str, Any]]]) -> None:
    rows = [row("default", 0, 1.0, 80.0, 20.0), row("default", 0, 2.0, 60.0, 60.0)]
    assert page.beside([row("magnitude", 0, 0.45, 69.0, 40.0), row("magnitude", 0, 0.7, 62.0, 60.0)], rows) == [pytest.approx((69 - 70 + 62 - 60) / 2)]
    assert page.beside([row("magnitude", 0, 0.7, 90.0, 61.0)], rows) == [], "the default has none so small"
    line = next(line for line in page.table(told, (OWN, RIVAL, CONTROL)) if "magnitude" in line)
    assert line.split("|")[6] == " -10.0 ± 0.0 "


def test_rivals_are_held_against_the_default_with_its_best_weight_decay(told: dict[str, list[dict[str, Any]]]) -> None:
    """Where another decay is better for a strength; as the demo has it in the table of its parts."""
    told["default-decay"] = [row("default-decay", seed, 2.2, 82.0, 50.0, weight_decay=4e-3) for seed in (0, 1)]
    told["default"] += [row("default", seed, 1.7, 70.0, 60.0) for seed in (0, 1)]
    tuned = page.as_tuned(told)["default-decay"]
    assert [(each["strength"], each["weight_decay"]) for each in page.by_seed(tuned)[0]] == [(2.2, 4e-3), (1.7, 5e-4)]
    line = next(line for line in page.parts_of(told, [])["rivals"] if "magnitude" in line)
    assert line.split("|")[4] == " 1.800 ± 0.000 ", "32 * 50 + 20 * 10 over 20 * 50"
    assert line.split("|")[6] == " -12.0 ± 0.0 "
    assert not any("default-decay" in line for line in page.parts_of(told, [])["parts"])
    told["between"].append(row("between", 0, 1.5, 75.0, 55.0))
    told["tuned-decay"] = [row("tuned-decay", 0, 0.0, 83.0, 0.0, weight_decay=1.6e-2)]
    points = {each["val_top1"] for each in page.line_of(page.as_tuned(told), "default-decay")}
    assert points == {82.0, 70.0, 75.0, 83.0}, "of the weaker penalties none with the demo's decay; without penalty that of the best"


def test_the_front_is_chosen_on_validation() -> None:
    rows = [row("default", 0, 1.0, 80.0, 50.0), {**row("default", 0, 2.0, 79.0, 50.0), "test_top1": 99.0}]
    assert page.volumes(rows, "test") == {0: (79 - 50) * 50}


def test_budgets_are_held_against_the_front_of_fixed_betas(told: dict[str, list[dict[str, Any]]]) -> None:
    seventy, fifty = page.budgets(told)[2:]
    assert fifty.split("|")[1:4] == [" 50 ", " 0.0005 ", " 49.0 ± 0.0 "]
    assert fifty.endswith("| no front there | - | - |  |"), "49 % is beyond the front"
    assert seventy.endswith("| -1.00 ± 0.00 | - | -1.00 ± 0.00 | size and accuracy |")
    alone = {name: [each for each in rows if each["seed"] == 0] for name, rows in told.items()}
    assert page.budgets(alone)[2].endswith("| -1.00 | - | -1.00 | size and accuracy |"), "one seed has no error"


def test_seeds_that_nothing_was_chosen_on_stand_beside_all(told: dict[str, list[dict[str, Any]]]) -> None:
    fresh = page.CHOSEN_ON.stop
    for name, rows in told.items():
        rows += [{**each, "seed": each["seed"] + fresh, "val_top1": each["val_top1"] + 2 * (name == "target")} for each in rows]
    seventy, _ = page.budgets(told)[2:]
    assert seventy.endswith("| 0.00 ± 0.58 | 1.00 ± 0.00 | 0.00 ± 0.58 | size |")


def test_budgets_and_fixed_betas_both_have_their_best_weight_decay(told: dict[str, list[dict[str, Any]]]) -> None:
    told["tuned-decay"] = [row("tuned-decay", seed, 0.0, 84.0, 0.0, weight_decay=1.6e-2) for seed in (0, 1)]
    told["default-decay"] = [row("default-decay", seed, 2.2, 82.0, 50.0, weight_decay=4e-3) for seed in (0, 1)]
    told["target"] = [row("target", seed, 80, 83.0, 20.0, weight_decay=4e-3) for seed in (0, 1)]
    (eighty,) = page.budgets(told)[2:]
    assert eighty.startswith("| 80 | 0.004 | 80.0 ± 0.0 | 0.0 | 83.00 ± 0.00 | -0.20 ± 0.00 |")


def test_a_budget_is_met_where_its_mean_is_on_the_front_of_the_means(told: dict[str, list[dict[str, Any]]]) -> None:
    """A seed's own front is of its lucky points: here one of two at the same size, another in each seed."""
    told["default"] = [row("default", seed, 2.2 + number, 80.0 + 2 * (seed == number), 50.0) for seed in (0, 1) for number in (0, 1)]
    told["target"] = [row("target", seed, 50, 81.0, 50.0) for seed in (0, 1)]
    (fifty,) = page.budgets(told)[2:]
    assert fifty.endswith("| 0.00 ± 0.00 | - | -1.00 ± 0.00 |  |")


def test_more_seeds_of_the_default_leave_the_comparison_as_it_is(told: dict[str, list[dict[str, Any]]]) -> None:
    """They are for the budgets alone."""
    before = page.parts_of(told, [])
    told["default"].append(row("default", 2, 2.2, 90.0, 50.0))
    told["none"].append(row("none", 2, 0.0, 90.0, 0.0))
    told["target"].append(row("target", 2, 70, 70.0, 33.0))
    after = page.parts_of(told, [])
    assert {name: after[name] for name in ("rivals", "parts", "strengths", "init")} == {name: before[name] for name in ("rivals", "parts", "strengths", "init")}
    assert "seeds 0, 1 (of fixed betas and budgets 0, 1, 2); " in after["date"][0]
    assert after["target"] != before["target"]


def test_the_error_of_a_mean_by_the_jackknife_is_its_standard_error() -> None:
    values = [1.0, 2.0, 4.0, 8.0]
    without_one = [statistics.mean(values[:number] + values[number + 1 :]) for number in range(4)]
    assert page.jackknife_error(without_one) == pytest.approx(statistics.stdev(values) / 2)


def test_a_start_from_dense_weights_is_compared_on_the_images_that_are_watched(told: dict[str, list[dict[str, Any]]]) -> None:
    (line,) = page.from_dense(told)[2:]
    assert line.endswith("| 1.00 ± 0.00 | -0.50 ± 0.00 |"), "81 less 80 of all images; 79 less 79.5 of the first"


def test_what_goes_on_from_a_training_that_failed_fails_too(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"method": "default", "seed": 0, "strength": 1.0, "error": "the loss is not finite"}) + "\n")
    with pytest.raises(ValueError, match="no widths: the default failed at strength 1 of seed 0"):
        METHODS["scratch"].run(TINY, 0, 1.0, tmp_path)
    with pytest.raises(ValueError, match="no dense weights: the training without penalty failed for seed 0"):
        METHODS["init"].run(TINY, 0, 4.2, tmp_path)


def test_accuracy_of_a_front_lies_on_straight_lines() -> None:
    rows = [row("default", 0, 1.0, 60.0, 90.0), row("default", 0, 2.0, 80.0, 50.0), row("default", 0, 3.0, 70.0, 45.0)]
    assert page.on_front(rows, 30.0) == pytest.approx(70.0)
    assert page.on_front(rows, 55.0) == 80.0
    assert page.on_front(rows, 9.0) is None


def test_the_page_is_written_between_its_marks(told: dict[str, list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for rows in told.values() for each in rows))
    assert {name: len(rows) for name, rows in told.items()} == {
        name: sum(each["method"] == name for each in rows_of(tmp_path)) for name in told
    }
    marks = ("date", "rivals", "parts", "strengths", "target", "init", "sensitivity")
    written = tmp_path / "learning.md"
    written.write_text("# Words\n" + "".join(f"<!-- {mark} -->\nold\n<!-- end -->\nkept {mark}\n" for mark in marks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["page", str(tmp_path), str(written)])
        assert page.main() == 0
        text = written.read_text()
        assert "old" not in text
        assert all(f"kept {mark}" in text for mark in marks)
        assert page.main() == 0
        assert written.read_text() == text
        assert sorted(file.name for file in tmp_path.glob("*.svg")) == ["learning-parts.svg", "learning-rivals.svg", "learning-use.svg"]
        written.write_text("no marks")
        assert page.main() == 2
        assert "has no place for 'date'" in capsys.readouterr().err
        assert written.read_text() == "no marks"
        patch.setattr("sys.argv", ["page", str(tmp_path / "nowhere"), str(written)])
        assert page.main() == 2
        assert "has no rows of 'none'" in capsys.readouterr().err


def test_the_written_page_is_that_of_its_trainings() -> None:
    written = (run.ROOT / "docs" / "learning.md").read_text()
    rows_by, failed = page.told_in(run.ROOT / "benchmarks" / "learning" / "small")
    parts = page.parts_of(rows_by, failed)
    del parts["date"]
    assert page.filled(written, parts) == written


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.decays])
def test_each_strength_is_trained_with_its_weight_decay(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    assert len(method.decays) == len(method.strengths)
    found: list[float] = []

    def watch(setting: Setting, *_: Any) -> Any:
        found.append(setting.config(0).train.weight_decay)

    watched = method._replace(run=watch)
    for strength in method.strengths:
        watched.trained(TINY, 0, strength, tmp_path)
    assert tuple(found) == method.decays


def test_a_rivals_own_penalty_is_as_strong_as_its_share_wants(tmp_path: Path) -> None:
    found: list[dict[str, float]] = []

    def watch(*_: Any, **options: float) -> Any:
        found.append(options)

    rival(watch, {0.25: 1e-4, 0.8: 1e-3}, TINY, 0, 0.8, tmp_path)
    rival(watch, {}, TINY, 0, 0.8, tmp_path)
    assert found == [{"weight": 1e-3}, {}]


@pytest.mark.parametrize("program", [run, page])
def test_a_torn_line_is_named(program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As a comparison leaves that is killed while it writes."""
    torn = json.dumps(row("none", 0, 0.0, 80.0, 0.0)) + '\n{"method": "none", "seed"'
    (tmp_path / "rows.jsonl").write_text(torn)
    monkeypatch.setattr("sys.argv", ["program", str(tmp_path), *([str(tmp_path / "page.md")] if program is page else [])])
    try:
        code = program.main()
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    assert re.search(r"rows\.jsonl, line 2 is not a whole training: delete it.*\n$", capsys.readouterr().err)
    assert [each.name for each in tmp_path.iterdir()] == ["rows.jsonl"]
    assert (tmp_path / "rows.jsonl").read_text() == torn


def test_every_method_is_of_one_kind_and_has_its_strengths() -> None:
    rivals_: Mapping[str, Any] = {name: method for name, method in METHODS.items() if method.kind == RIVAL}
    assert len(rivals_) >= 8
    assert all(len(method.strengths) >= 3 for name, method in rivals_.items() if name != "l2"), "so that each has a front; after l2 nothing is zero"
    assert {name for name, method in METHODS.items() if method.kind == PART} == {"gs", "revive", "free-at-the-end", "each-epoch", "no-root", "first-weaker"}
    assert replace(TINY, epochs=4).config(0).train.epochs == 4
