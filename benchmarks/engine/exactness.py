"""Are the engine's effects those of full passes? Ten networks against brute-force hooks, windows against Captum.

For every network, in float32 and float64: the effects of channels of an early, a middle and the last layer on all
logits, by a full pass for each channel with a hook that sets it to zero (a part of the channels, spread over the
layer), against `LayerCausalEffect` (all channels); and maps of occluding windows, Captum's `Occlusion` against
`CausalEffect`. Brute-force results are cached, so that only the engine is run again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from captum.attr import Occlusion
from torch import Tensor, nn

from benchmarks.common.networks import HOW, NETWORKS, network
from benchmarks.common.results import write
from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.designs import OneAtATime
from ce_plugin.files import written_whole
from ce_plugin.sites import LayerSite

DTYPES = {"float32": torch.float32, "float64": torch.float64}
BOUNDS = {"float32": 1e-4, "float64": 1e-9}
NOISE_FACTOR = 1000
# Side and stride of square windows, in pixels: small ones side by side, large ones that overlap; fewer for slow
# networks.
WINDOWS = {"float32": ((16, 16), (64, 40)), "float64": ((32, 32),)}
FEWER_WINDOWS = {"float32": ((32, 32), (64, 40)), "float64": ((56, 56),)}
LONG = ("VGG-16", "Inception v3", "ConvNeXt-tiny", "ViT-B/16")


def windows_of(name: str, kind: str) -> tuple[tuple[int, int], ...]:
    """The windows that are compared."""
    return (FEWER_WINDOWS if name in LONG else WINDOWS)[kind]


def brute_effects(model: nn.Module, x: Tensor, layer: str, dim: int, count: int) -> tuple[Tensor, Tensor]:
    """Channels and their effects on all logits, (count, C), by full passes of one image each."""
    shapes: list[int] = []
    module = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda m, args, output: shapes.append(output.shape[dim]))
    reference = model(x)
    handle.remove()
    units = torch.linspace(0, shapes[0] - 1, min(count, shapes[0])).round().long()
    rows = []
    for unit in units.tolist():

        def zero(m: nn.Module, args: Any, output: Tensor, unit: int = unit) -> Tensor:
            changed = output.clone()
            changed.select(dim, unit).zero_()
            return changed

        handle = module.register_forward_hook(zero)
        rows.append(model(x) - reference)
        handle.remove()
    return units, torch.cat(rows).clone()


def rounding_noise(model: nn.Module, x: Tensor) -> float:
    """Largest difference of a logit between batches of one and batches of 3 and 8 equal images."""
    single = model(x)
    return max(float((model(x.expand(n, -1, -1, -1).contiguous()) - single).abs().max()) for n in (3, 8))


def occlusion_map(model: nn.Module, x: Tensor, target: int, side: int, stride: int) -> Tensor:
    """A map of one logit: Captum's in float32; reimplemented in float64, for which Captum returns float32."""
    if x.dtype == torch.float32:
        found: Tensor = Occlusion(model).attribute(
            x, (3, side, side), strides=(3, stride, stride), baselines=0, target=target
        )
        return found
    steps = [slice(k * stride, k * stride + side) for k in range(-(-(x.shape[-1] - side) // stride) + 1)]
    total, count, clean = torch.zeros_like(x), torch.zeros_like(x), model(x)[0, target]
    for rows in steps:
        for columns in steps:
            occluded = x.clone()
            occluded[:, :, rows, columns] = 0
            total[:, :, rows, columns] += clean - model(occluded)[0, target]
            count[:, :, rows, columns] += 1
    return total / count


def kept(name: str, make: Callable[[], Any], options: argparse.Namespace) -> Any:
    """The cached result of this name, or a new one."""
    place = options.cache / f"{name.replace('/', '-')}.pt"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        made = make()
        with written_whole(place) as stream:
            torch.save(made, stream)
    return torch.load(place)


def reference_of(name: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Brute-force results for one network and dtype, cached."""
    count = (options.channels if kind == "float32" else options.channels64) // (2 if name in LONG else 1)
    with torch.no_grad():
        model, x = network(name, DTYPES[kind])
        start = f"{name}-{kind}"
        target = kept(f"{start}-target", lambda: int(model(x).argmax()), options)
        return {
            "target": target,
            "noise": kept(f"{start}-noise", lambda: rounding_noise(model, x), options),
            "layers": {
                layer: kept(f"{start}-{layer}-{count}", partial(brute_effects, model, x, layer, dim, count), options)
                for layer, dim in NETWORKS[name].layers.items()
            },
            "windows": [
                kept(f"{start}-map-{side}-{stride}", partial(occlusion_map, model, x, target, side, stride), options)
                for side, stride in windows_of(name, kind)
            ],
        }


def compared(found: Tensor, wanted: Tensor, noise: float, kind: str) -> dict[str, Any]:
    """The largest difference as a share of the largest effect, and the same for an engine that returns zeros."""
    largest = float(wanted.abs().max())
    difference = float((found - wanted).abs().max()) / largest
    zeros = float(wanted.abs().max()) / largest
    return {
        "largest_effect": largest,
        "difference": difference,
        "zero_engine": zeros,
        "noise": noise,
        "effect_over_noise": largest / noise if noise else None,
        "holds": difference <= BOUNDS[kind] and (not noise or largest >= NOISE_FACTOR * noise),
        "zero_engine_fails": zeros > BOUNDS[kind],
    }


def only(layer: str, dim: int, units: Tensor) -> LayerSite:
    """The layer with only these channels as units."""

    def chosen(value: Tensor) -> Tensor:
        maps = value.movedim(dim, 1)[:, units]
        return maps if maps.dim() == 4 else maps[..., None]

    return LayerSite(layer, reshape_transform=chosen)


def finished(name: str, kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases of one network and dtype, cached."""
    place = options.cache / f"{name.replace('/', '-')}-{kind}-{options.engine}{'-all' if options.all else ''}.json"
    if options.again or not place.exists():
        rows = cases(name, kind, options)
        place.write_text(json.dumps(rows))
    found: list[dict[str, Any]] = json.loads(place.read_text())
    return found


def cases(name: str, kind: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The engine against the reference: a row for each layer and kind of window."""
    reference = reference_of(name, kind, options)
    model, x = network(name, DTYPES[kind])
    rows = []
    for layer, dim in NETWORKS[name].layers.items():
        units, wanted = reference["layers"][layer]
        whole = options.all or (kind == "float32" and name not in LONG)
        site = LayerSite(layer, channel_dim=dim) if whole else only(layer, dim, units)
        explainer = LayerCausalEffect(model, site, outcome=None, engine=options.engine)
        start = time.perf_counter()
        effect = explainer.estimate(x).effect[0]
        seconds = time.perf_counter() - start
        rows.append(
            {
                "network": name,
                "type": kind,
                "site": layer,
                "units": len(effect),
                "compared": len(units),
                "route": explainer.estimate_cost(x).route,
                "seconds": seconds,
                **compared(effect[units] if whole else effect, wanted, reference["noise"], kind),
            }
        )
        print(line(rows[-1]), flush=True)
    for (side, stride), wanted in zip(windows_of(name, kind), reference["windows"], strict=True):
        windows = CausalEffect(model, None, OneAtATime(), outcome=None, engine=options.engine)
        options_of = {"sliding_window_shapes": (3, side, side), "strides": (3, stride, stride)}
        start = time.perf_counter()
        found = windows.attribute(x, baselines=0, target=reference["target"], **options_of)
        seconds = time.perf_counter() - start
        cost = windows.estimate_cost(x, target=reference["target"], **options_of)
        rows.append(
            {
                "network": name,
                "type": kind,
                "site": f"windows {side}/{stride}",
                "units": cost.trials,
                "compared": cost.trials,
                "route": cost.route,
                "seconds": seconds,
                **compared(found, wanted, reference["noise"], kind),
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    over = f"{row['effect_over_noise']:.1e}" if row["effect_over_noise"] else "-"
    return (
        f"| {row['network']} | {row['type']} | {row['site']} | {row['compared']} of {row['units']} | {row['route']} "
        f"| {row['largest_effect']:.3g} | {row['noise']:.1e} | {over} | {row['difference']:.1e} "
        f"| {'yes' if row['holds'] else '**no**'} | {'yes' if row['zero_engine_fails'] else '**no**'} |"
    )


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Worst cases first, then every case."""
    worst = {kind: max((row["difference"] for row in rows if row["type"] == kind), default=0.0) for kind in DTYPES}
    failed = [row for row in rows if not row["holds"]]
    over = min((row["effect_over_noise"] for row in rows if row["type"] == "float32"), default=0.0)
    fooled = sum(not row["zero_engine_fails"] for row in rows)
    text = [
        "### Exactness of the engine",
        "",
        f"Effects on logits of one photograph, engine `{options.engine}`. {HOW} At most {options.channels} channels",
        f"(float64: {options.channels64}; half of that in networks whose passes are long), spread over the layer, were",
        "set to zero by hooks, a full pass of one image for each. The engine ran all channels, or, where the table",
        "says `n of n`, those. Windows (side/stride in pixels, set to 0 in the network's units) were compared, as",
        "maps, with Captum's `Occlusion`; that answers in float32 for float64 networks too, so that there a loop by",
        "hand stands for it. Difference: the largest one over all classes, divided by the largest absolute effect",
        "among those compared. Noise: how much logits differ between batches of 1, 3 and 8 equal images.",
        "",
        f"**{len(rows) - len(failed)} of {len(rows)} cases** are within the bound ({BOUNDS['float32']:.0e} in float32,"
        f" {BOUNDS['float64']:.0e} in float64).",
        f"Largest difference: {worst['float32']:.1e} in float32, {worst['float64']:.1e} in float64. The largest effect",
        f"exceeds the noise at least {over:.2g} times (float32). An engine that answers 0 would pass {fooled} cases.",
        "",
        "| network | type | site | compared | route | largest effect | noise | effect / noise | difference | holds "
        "| zeros fail |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *map(line, rows),
    ]
    data = {"cases": rows, "worst": worst, "failed": len(failed), "zeros_pass": fooled}
    write("engine_exactness", "\n".join(text), data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ce-plugin" / "engine_exactness"
    parser.add_argument("--cache", type=Path, default=home, help="folder of brute force (default: %(default)s)")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--types", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--channels", type=int, default=24, help="channels of a layer by brute force in float32")
    parser.add_argument("--channels64", type=int, default=8, help="the same in float64")
    parser.add_argument("--engine", choices=("auto", "suffix", "full"), default="auto")
    parser.add_argument("--again", action="store_true", help="run the engine anew; brute force stays in the cache")
    parser.add_argument("--all", action="store_true", help="the engine runs all channels of every case (long)")
    parser.add_argument("--brute-only", action="store_true", help="fill the cache, run no engine")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.brute_only:
        for name in options.networks:
            for kind in options.types:
                start = time.perf_counter()
                reference_of(name, kind, options)
                print(f"{name} {kind}: {time.perf_counter() - start:.0f} s", flush=True)
        return
    report(
        [row for name in options.networks for kind in options.types for row in finished(name, kind, options)], options
    )


if __name__ == "__main__":
    main()
