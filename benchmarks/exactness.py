"""How exact removal is, on all 80 classification networks of torchvision, and whether torch-pruning removes the same.

    python benchmarks/exactness.py [NAME ...] [--peer] [--json FILE]

For each network, with heads, biases and BatchNorm statistics randomised so that outputs are of order one: its neurons, the share that
cannot be removed and why; seconds and peak memory of `find_neurons` and of `compact` at the size of image it was made for; and on a smaller
image, after a random third of the removable neurons and a quarter of the branches died, the largest difference of outputs, gradients and
running statistics in float64, in evaluation and in training mode, relative to the largest value. Then a live neuron is cut instead, which
must be seen.

--peer: also torch-pruning 1.6.1 (`pip install torch-pruning`): the parameters that produce a channel, group by group, against ours; and
whether its own removal leaves the outputs as they were, where a random third of each of its groups is set to zero and pruned.

--line: seconds and memory of one network, Dec8, at widths that double its parameters each time, and the exponents of their growth.

Each network runs in a process of its own, on the cores that it is given (`taskset -c 0`). All of them take an hour and a half on two cores.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

sys.path.insert(0, str(Path(__file__).parent.parent))
import dist_gsl
from dist_gsl.models import torchvision_models
from tests.exactness import check_exact, kill_a_third_, moved_by_one_live_neuron, randomise_, without_randomness_

PEER_GIB, PEER_S = 12, 600
"""What torch-pruning may take of memory and time for a network; Swin's take all that there is."""
PATCH = {"vit_h_14": 14, "vit_b_32": 32, "vit_l_32": 32}


def native_size(name: str) -> int:
    return 299 if name == "inception_v3" else 224


def small_size(name: str) -> int:
    """Small images cost less; MaxViT's windows need the whole."""
    if name.startswith("vit_"):
        return 2 * PATCH.get(name, 16)
    return 224 if name.startswith("maxvit") else 96 if name == "inception_v3" else 64


def network(name: str, size: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    fixes_size = name.startswith(("vit_", "maxvit_"))
    model = dist_gsl.create_model(name, num_classes=10, image_size=size if fixes_size else None).eval()
    randomise_(model)
    without_randomness_(model)
    return model, torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def peak_mebibytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def costs(name: str) -> dict[str, Any]:
    """Time and memory at the native size."""
    model, x = network(name, native_size(name))
    parameters = sum(p.numel() for p in model.parameters())
    before = peak_mebibytes()
    began = time.monotonic()
    neurons = dist_gsl.find_neurons(model, x[:1])
    found_s = time.monotonic() - began
    found_mib = peak_mebibytes() - before
    layers = neurons.all_layers
    pinned = [layer for layer in layers if layer.pinned is not None and layer.pinned != dist_gsl.neurons.OUTPUTS]
    reasons: Counter[str] = Counter()
    for layer in pinned:
        assert layer.pinned is not None
        reasons[re.sub(r"'[^']*'", "…", layer.pinned.partition(" at ")[0].partition(" (")[0])] += layer.num_neurons
    hidden = sum(layer.num_neurons for layer in layers if layer.pinned != dist_gsl.neurons.OUTPUTS)
    kill_a_third_(neurons, empty=0.25)
    began = time.monotonic()
    result = dist_gsl.compact(model, neurons)
    return {
        "parameters": parameters, "layers": len(neurons), "may_vanish": sum(layer.bypassed for layer in neurons), "neurons": hidden,
        "pinned_percent": 100 * sum(layer.num_neurons for layer in pinned) / hidden, "reasons": [r for r, _ in reasons.most_common(2)],
        "find_s": found_s, "find_mib": found_mib, "compact_s": time.monotonic() - began, "peak_mib": peak_mebibytes(),
        "native_difference": result.max_abs_difference / result.max_abs_output,
    }  # fmt: skip


def line(width: str) -> dict[str, Any]:
    """Time and memory of a network whose layers stay and whose parameters grow; a third of its neurons dies."""
    torch.manual_seed(0)
    model, x = dist_gsl.create_model("dec8", num_classes=10, width=float(width)).eval(), torch.randn(1, 3, 64, 64)
    before, began = peak_mebibytes(), time.monotonic()
    neurons = dist_gsl.find_neurons(model, x)
    found_s, found_mib = time.monotonic() - began, peak_mebibytes() - before
    kill_a_third_(neurons)
    began = time.monotonic()
    dist_gsl.compact(model, neurons)
    return {
        "parameters": sum(p.numel() for p in model.parameters()), "find_s": found_s, "find_mib": found_mib, "compact_s": time.monotonic() - began,
        "compact_mib": peak_mebibytes() - before,
    }  # fmt: skip


def print_line() -> None:
    rows = [run("line", f"{2 ** (power / 2):.3f}") for power in range(-3, 6)]
    print("| parameters | find: s, MiB | compact: s, GiB |\n|---|---|---|")
    for row in rows:
        print(f"| {row['parameters'] / 1e6:.1f} M | {row['find_s']:.2f}, {row['find_mib']} | {row['compact_s']:.2f}, {row['compact_mib'] / 1024:.2f} |")
    sizes = [math.log(row["parameters"]) for row in rows]
    for key in ("find_s", "compact_s", "compact_mib"):
        slope = statistics.linear_regression(sizes[-6:], [math.log(row[key]) for row in rows[-6:]]).slope
        print(f"{key} grows with the parameters to the power of {slope:.2f} (the last six rows)")


def exactness(name: str) -> dict[str, Any]:
    model, x = network(name, small_size(name))
    neurons = dist_gsl.find_neurons(model, x[:1])
    layers = list(neurons)
    moved = min(moved_by_one_live_neuron(model, neurons, layers[i], x) for i in {0, len(layers) // 2, len(layers) - 1})
    dead = kill_a_third_(neurons, empty=0.25)
    begun = sum(p.numel() for p in model.parameters())
    removed = begun - sum(p.numel() for p in dist_gsl.compact(model, neurons).model.parameters())
    return {"dead": dead, "removed_percent": 100 * removed / begun, "worst": check_exact(model, neurons, x), "moved": moved}


# --- torch-pruning


def producers_of(neurons: dist_gsl.Neurons) -> dict[tuple[str, int], set[tuple[str, int]]]:
    """{(module of a convolution or linear layer, output channel): (module, channel) of all that is one neuron with it}."""
    modules = dict(neurons.model.named_modules())
    found = {}
    for layer in neurons.all_layers:
        for n in range(layer.num_neurons):
            members = {(piece.tensor.rpartition(".")[0], int(i)) for piece in layer.producers for i in piece.index[n]}
            for module, channel in members:
                if isinstance(modules.get(module), nn.Conv2d | nn.Linear):
                    found[module, channel] = members
    return found


def peer(name: str) -> dict[str, Any]:
    """torch-pruning on the same network."""
    import torch_pruning as tp

    model, x = network(name, small_size(name))
    neurons = dist_gsl.find_neurons(model, x[:1])
    ours, names = producers_of(neurons), {module: key for key, module in model.named_modules()}
    free = {piece.tensor.rpartition(".")[0] for layer in neurons for piece in layer.producers}
    outputs = [key for key, m in model.named_modules() if any(
        layer.pinned == dist_gsl.neurons.OUTPUTS and piece.tensor.startswith(key + ".") for layer in neurons.all_layers for piece in layer.producers
    ) and isinstance(m, nn.Linear | nn.Conv2d)]  # fmt: skip
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    same = different = 0
    example = ""
    for key, module in model.named_modules():
        if key not in free or not isinstance(module, nn.Conv2d | nn.Linear) or module not in graph.module2node:
            continue
        prune = graph.get_pruner_of_module(module).prune_out_channels
        size = module.weight.shape[0]
        step = within_groups(graph.get_pruning_group(module, prune, idxs=[0]), size)
        for channel in {0, size // 2, size - 1}:
            group = graph.get_pruning_group(module, prune, idxs=list(range(channel % step, size, step)))
            theirs = {
                (names[dep.target.module], int(i)) for dep, indices in group if graph.is_out_channel_pruning_fn(dep.handler)
                and isinstance(dep.target.module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.BatchNorm1d) for i in indices
            }  # fmt: skip
            mine = {m for m in ours[key, channel] if isinstance(dict(model.named_modules()).get(m[0]), nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.BatchNorm1d)}
            if theirs == mine:
                same += 1
            else:
                different += 1
                example = example or f"{key}[{channel}]: {sorted(mine - theirs)[:2]} ours alone, {sorted(theirs - mine)[:2]} theirs alone"
    return {"same": same, "different": different, "example": example, **pruned(tp, model, x, outputs)}


def within_groups(group: Any, size: int) -> int:
    """How many channels each group has of the grouped convolutions that a pruning group meets, depthwise ones aside, or each head of its
    attention. As its own pruners do, as many are taken from each."""
    modules = [dep.target.module for dep, _ in group]
    parts = [m.groups for m in modules if isinstance(m, nn.Conv2d) and m.groups < m.in_channels]
    return size // max([*parts, *(m.num_heads for m in modules if isinstance(m, nn.MultiheadAttention))], default=1)


def pruned(tp: Any, model: nn.Module, x: Tensor, outputs: list[str]) -> dict[str, Any]:
    """Sets a random third of each of its groups to zero, all that the group says produces the channel, and prunes them."""
    model = copy.deepcopy(model)
    ignored = [model.get_submodule(key) for key in outputs]
    generator = torch.Generator().manual_seed(0)
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    chosen = []
    for group in graph.get_all_groups(ignored_layers=ignored, root_module_types=[nn.Conv2d, nn.Linear]):
        root, handler = group[0].dep.target.module, group[0].dep.handler
        size = graph.get_out_channels(root)
        step = within_groups(group, size)
        picks = torch.randperm(step, generator=generator)[: step // 3].tolist()
        indices = [p + step * g for p in picks for g in range(size // step)]
        if indices:
            chosen.append((root, handler, sorted(indices)))
    with torch.no_grad():
        for root, handler, indices in chosen:
            for dep, where in graph.get_pruning_group(root, handler, idxs=indices):
                if graph.is_out_channel_pruning_fn(dep.handler):
                    target = dep.target.module
                    for parameter in [target] if isinstance(target, nn.Parameter) else target.parameters(recurse=False):
                        dim = 1 if isinstance(target, nn.Parameter) and parameter.dim() > 1 else 0
                        if parameter.shape[dim] > max(where):
                            parameter.index_fill_(dim, torch.tensor(where), 0)
        before = copy.deepcopy(model).double().eval()(x.double())
        for root, handler, indices in chosen:
            group = graph.get_pruning_group(root, handler, idxs=indices)
            if graph.check_pruning_group(group):
                group.prune()
        if isinstance(model, VisionTransformer):  # a width that its forward reads, as torch-pruning's own example mends it
            model.hidden_dim = model.conv_proj.out_channels
        after = model.double().eval()(x.double())
    return {"peer_difference": float((before - after).abs().max() / before.abs().max())}


# --- all of them


def one(part: str, name: str) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if part == "peer":
        resource.setrlimit(resource.RLIMIT_DATA, (PEER_GIB << 30, PEER_GIB << 30))
    print(json.dumps({"costs": costs, "exactness": exactness, "peer": peer, "line": line}[part](name)))


def run(part: str, name: str) -> dict[str, Any]:
    try:
        done = subprocess.run([sys.executable, __file__, "--part", part, name], capture_output=True, text=True, check=False,
                              timeout=PEER_S if part == "peer" else None)  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {PEER_S} s"}
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--peer", action="store_true", help="torch-pruning instead")
    parser.add_argument("--line", action="store_true", help="how time and memory grow with the parameters instead")
    parser.add_argument("--json", type=Path, help="keep what is found here, after each network; what the file has already is not measured again")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        one(options.part, options.names[0])
        return
    if options.line:
        print_line()
        return
    names = options.names or torchvision_models.torchvision_names()
    found: dict[str, dict[str, Any]] = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.exists() else {}
    if options.peer:
        print("| network | channels with the same producers | difference after torch-pruning | note |\n|---|---|---|---|")
    else:
        print("| network | parameters | neurons | layers, may vanish | stay | why | worst difference | one live neuron | find: s, MiB | compact: s, peak GiB |")
        print("|---|---|---|---|---|---|---|---|---|---|")
    for name in names:
        if name not in found:
            found[name] = {}
            for part in ["peer"] if options.peer else ["costs", "exactness"]:
                found[name].update(run(part, name))
            if options.json:
                options.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
        entry = found[name]
        if "error" in entry:  # a network that fails is listed, and counted as not exact
            print(f"| {name} | failed: {entry['error']} |", flush=True)
        elif options.peer:
            print(f"| {name} | {entry['same']} of {entry['same'] + entry['different']} | {entry['peer_difference']:.1e} | {entry['example']} |", flush=True)
        else:
            print(
                f"| {name} | {entry['parameters'] / 1e6:.1f} M | {entry['neurons']:,} | {entry['layers']}, {entry['may_vanish']} | {entry['pinned_percent']:.1f} % | "
                f"{'; '.join(entry['reasons'])} | {max(entry['worst'], entry['native_difference']):.1e} | {entry['moved']:.1e} | "
                f"{entry['find_s']:.1f}, {entry['find_mib']} | {entry['compact_s']:.1f}, {entry['peak_mib'] / 1024:.1f} |", flush=True,
            )  # fmt: skip
    found = {name: found[name] for name in names}
    if not options.peer:
        exact = [name for name, entry in found.items() if "error" not in entry and max(entry["worst"], entry["native_difference"]) <= 1e-9]
        print(f"\nexact within 1e-9: {len(exact)} of {len(found)}; others: {sorted(set(found) - set(exact)) or 'none'}")
    else:
        exact = [name for name, entry in found.items() if "error" not in entry and entry["peer_difference"] <= 1e-9]
        print(f"\ntorch-pruning exact within 1e-9 on {len(exact)} of {len(found)}: {', '.join(exact)}")


if __name__ == "__main__":
    main()
