"""What a person sees of a training."""

import io

from rich.console import Console

from dist_gsl.display import LINE_EVERY_S, Display, Steps


def test_a_log_without_a_terminal_tells_of_long_epochs_now_and_then() -> None:
    text, now = io.StringIO(), [0.0]
    display = Display(Console(file=text, width=200), title="run", num_epochs=2, clock=lambda: now[0])
    record = {"epoch": 1, "train_loss": 1.0, "val_top1": 50.0, "all_neurons": 0.0, "images_per_second": 10.0}
    for step in range(7):
        now[0] += LINE_EVERY_S / 3
        display.progress(0, step, 7, 2.0, 1234.0)
    display.epoch(record, {}, {})
    now[0] += LINE_EVERY_S / 2
    display.progress(1, 0, 7, 2.0, 1234.0)
    lines = text.getvalue().splitlines()
    assert [line.split("  ")[2] for line in lines] == ["step 2/7", "step 5/7", "loss 1.000"]
    assert lines[0] == "run: epoch  1/2  step 2/7  loss 2.000  1,234 images/s"


def test_a_log_tells_how_fast_work_goes_and_how_long_it_takes() -> None:
    text, now = io.StringIO(), [0.0]
    steps = Steps(Console(file=text, width=200), clock=lambda: now[0])
    for done in range(1000, 5000, 1000):  # gone on with where it was
        steps("writing train", done, 10_000)
        now[0] += LINE_EVERY_S / 2
    steps("writing val", 0, 10)
    assert text.getvalue().splitlines() == ["writing train: 10,000", "writing train: 3,000 of 10,000, 67/s, 0:01:45 left", "writing val: 10"]
