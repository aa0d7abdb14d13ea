"""What do the effects of all units cost, in clean forward passes and compared with peers? Interleaved rounds.

One case is a layer of a network (or windows at its input). Every round times, one after the other: a clean pass; our
`estimate` with all units and all classes; Captum; pytorch-grad-cam; and a plain loop over the part of the network
behind the layer. The peers take minutes for one map, so in each round they run a limited number of trials at
their best batch size, and the time is extrapolated to all units (`--whole` runs Captum in full, once). Finished cases
are cached; `--again` measures them again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import LayerFeatureAblation, Occlusion
from torch import Tensor, nn

from benchmarks.common.networks import network
from benchmarks.engine._lower_bound import matrix_rate, operations_needed
from benchmarks.engine._speed_tables import CASES, STRIDE, WINDOW, Case, report
from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.designs import OneAtATime


class Timed:
    """What a round measures for one case: name -> (function that runs n trials, number of trials of a whole map)."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model, self.x = network(case.network)
        self.model.requires_grad_(False)
        if case.layer:
            self.layer = self.model.get_submodule(case.layer)
            self.planes = planes_of(self.model, self.layer, self.x)
            self.units = self.planes.shape[1]
            self.ours: Any = LayerCausalEffect(self.model, case.layer, outcome=None)
        else:
            self.planes, self.units = self.x, (-(-(self.x.shape[-1] - WINDOW) // STRIDE) + 1) ** 2
            self.ours = CausalEffect(self.model, None, OneAtATime(), outcome=None)

    def clean(self) -> None:
        with torch.inference_mode():
            self.model(self.x)

    def estimate(self) -> Any:
        if self.case.layer:
            return self.ours.estimate(self.x)
        return self.ours.estimate(
            self.x, baselines=0, sliding_window_shapes=(3, WINDOW, WINDOW), strides=(3, STRIDE, STRIDE)
        )

    def captum(self, trials: int, batch: int) -> int:
        """Captum with this number of trials (one unit holds the remaining channels); returns the number of images."""
        with torch.no_grad():
            if self.case.layer:
                mask = torch.arange(self.units).clamp(max=trials - 1)[None, :, None, None]
                LayerFeatureAblation(self.model, self.layer).attribute(
                    self.x, target=0, layer_mask=mask, perturbations_per_eval=batch
                )
                return trials + 2  # the layer's value, the clean output
            side = self.x.shape[-1] // round(trials**0.5)
            Occlusion(self.model).attribute(
                self.x, (3, side, side), strides=(3, side, side), baselines=0, target=0, perturbations_per_eval=batch
            )
        return (-(-self.x.shape[-1] // side)) ** 2 + 1

    def grad_cam(self, trials: int, batch: int) -> int:
        """AblationCAM's weights of this number of channels; returns the number of images."""
        from pytorch_grad_cam import AblationCAM
        from pytorch_grad_cam.ablation_layer import AblationLayer
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        class First(AblationLayer):  # type: ignore[misc]
            def activations_to_be_ablated(self, activations: Any, ratio_channels_to_ablate: float = 1.0) -> Any:
                self.indices = np.arange(trials, dtype=np.int32)
                return self.indices

        cam = AblationCAM(self.model, [self.layer], ablation_layer=First(), batch_size=batch)
        try:
            cam.get_cam_weights(self.x, self.layer, [ClassifierOutputTarget(0)], self.planes.numpy(), np.zeros(0))
        finally:
            cam.activations_and_grads.release()
        return trials + 1

    def loop(self, trials: int, batch: int) -> int:
        """The part of the network behind the layer, on batches of ablated planes, all classes."""
        done = 0
        with torch.inference_mode():
            reference = self.tail(self.planes)
            while done < trials:
                units = torch.arange(done, min(done + batch, trials))
                rows = self.planes.repeat(len(units), 1, 1, 1)
                if self.case.layer:
                    rows[torch.arange(len(units)), units % self.units] = 0
                else:
                    rows[:, :, :WINDOW, :WINDOW] = 0
                _ = self.tail(rows) - reference
                done += len(units)
        return trials + 1

    def tail(self, planes: Tensor) -> Tensor:
        return tail(self.model, self.case, planes)

    def peers(self) -> dict[str, Callable[[int, int], int]]:
        found = {"captum": self.captum, "grad-cam": self.grad_cam, "suffix loop": self.loop}
        return found if self.case.layer else {"captum": self.captum, "suffix loop": self.loop}


def planes_of(model: nn.Module, layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's output."""
    kept: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return kept[0]


def tail(model: Any, case: Case, planes: Tensor) -> Tensor:
    """The part of the network after the layer, written by hand."""
    out: Tensor
    if case.network == "VGG-16":
        first = int(case.layer.split(".")[1]) + 1 if case.layer else 0
        out = model.classifier(model.avgpool(model.features[first:](planes)).flatten(1))
    elif case.network == "ResNet-50":
        planes = model.layer4(planes) if case.layer == "layer3" else planes
        out = model.fc(model.avgpool(planes).flatten(1))
    else:
        out = model.classifier(torch.relu(planes).mean((2, 3)))
    return out


def seconds(function: Callable[[], Any], repeats: int = 1) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def per_map(peer: Callable[[int, int], int], trials: int, batch: int, units: int) -> float:
    """Seconds of a whole map, extrapolated from some trials to the images that all units need."""
    start = time.perf_counter()
    rows = peer(trials, batch)
    return (time.perf_counter() - start) / rows * (rows - trials + units)


def best_batches(timed: Timed, options: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Seconds of a whole map at every batch size, the better of two timings."""
    found: dict[str, dict[int, float]] = {name: {} for name in timed.peers()}
    for _ in range(2):
        for batch in options.batches:
            for name, peer in timed.peers().items():
                took = per_map(peer, trials_of(name, batch, timed, options), batch, timed.units)
                found[name][batch] = min(took, found[name].get(batch, took))
    return found


def trials_of(name: str, batch: int, timed: Timed, options: argparse.Namespace) -> int:
    """At least `--trials`, in whole batches; the cheap loop after a last layer runs all its units."""
    wanted = max(options.trials, batch)
    if name == "suffix loop" and timed.case.layer and timed.case.ratio >= 100:
        wanted = min(timed.units, 16 * wanted)
    return wanted // batch * batch


def measure(key: str, options: argparse.Namespace) -> dict[str, Any]:
    """One case: the search for batch sizes, the rounds, the lower bound, the profile."""
    case = CASES[key]
    timed = Timed(case)
    timed.clean()
    first = seconds(timed.estimate)
    searched = best_batches(timed, options)
    best = {name: min(table, key=lambda batch: table[batch]) for name, table in searched.items()}
    rounds: list[dict[str, float]] = []
    for _ in range(options.pairs):
        one = {"clean": seconds(timed.clean, 5), "ours": seconds(timed.estimate)}
        for name, peer in timed.peers().items():
            trials = trials_of(name, best[name], timed, options)
            one[name] = per_map(peer, trials, best[name], timed.units)
        if case.layer:
            one["suffix loop"] += one["clean"]  # which computes the layer's value
        one["clean"] = (one["clean"] + seconds(timed.clean, 5)) / 2
        rounds.append(one)
        print(key, {k: round(v, 3) for k, v in one.items()}, flush=True)
    rate = matrix_rate()
    found = {
        "units": timed.units, "first_call": first, "searched": searched, "best": best, "rounds": rounds,
        "lower_bound": operations_needed(case.network, case.layer, timed, WINDOW, STRIDE), "matrix_rate": rate,
        "profile": profile(timed), "whole": {}, "cost": str(cost(timed)),
    }  # fmt: skip
    if options.whole:
        start = time.perf_counter()
        whole_captum(timed, best["captum"])
        found["whole"] = {"captum": time.perf_counter() - start}
    return found


def whole_captum(timed: Timed, batch: int) -> None:
    """Captum as a user calls it."""
    with torch.no_grad():
        if timed.case.layer:
            mask = torch.arange(timed.units)[None, :, None, None]
            LayerFeatureAblation(timed.model, timed.layer).attribute(
                timed.x, target=0, layer_mask=mask, perturbations_per_eval=batch
            )
        else:
            Occlusion(timed.model).attribute(
                timed.x, (3, WINDOW, WINDOW), strides=(3, STRIDE, STRIDE), baselines=0, target=0,
                perturbations_per_eval=batch,
            )  # fmt: skip


def cost(timed: Timed) -> Any:
    """What estimate_cost says."""
    if timed.case.layer:
        return timed.ours.estimate_cost(timed.x)
    options: dict[str, Any] = {
        "sliding_window_shapes": (3, WINDOW, WINDOW), "strides": (3, STRIDE, STRIDE),
    }  # fmt: skip
    return timed.ours.estimate_cost(timed.x, **options)


def profile(timed: Timed) -> list[tuple[str, float]]:
    """The operations that take most of our time, and their share of it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        timed.estimate()
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    ranked = sorted(events, key=lambda event: -event.self_cpu_time_total)[:6]
    return [(event.key, event.self_cpu_time_total / total) for event in ranked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ce-plugin" / "engine_speed"
    parser.add_argument("--cache", type=Path, default=home, help="folder of finished cases (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure finished cases anew")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--pairs", type=int, default=10, help="interleaved rounds")
    parser.add_argument("--trials", type=int, default=16, help="trials of the peers in a round, at least")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16], help="tried by the peers")
    parser.add_argument("--whole", action="store_true", help="run Captum in full, once for each case")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = {}
    for key in options.cases:
        place = options.cache / f"{key}.json"
        if options.again or not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps(measure(key, options)))
        found[key] = json.loads(place.read_text())
    report(found, options)


if __name__ == "__main__":
    main()
