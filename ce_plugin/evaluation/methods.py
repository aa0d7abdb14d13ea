"""Attribution methods under one call, with their passes counted: ours, Captum's, pytorch-grad-cam's, and baselines."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from captum.attr import (
    InputXGradient,
    IntegratedGradients,
    KernelShap,
    LayerGradCam,
    Lime,
    NoiseTunnel,
    Occlusion,
    Saliency,
)
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ce_plugin.attribution import CausalEffect, CausalEffectMap
from ce_plugin.designs import RandomMask
from ce_plugin.errors import ArgumentError, ModelError, expected, unknown_name
from ce_plugin.interventions import Context, Normalization, PixelMask
from ce_plugin.networks.guard import state_guard
from ce_plugin.networks.layers import last_map
from ce_plugin.randomness import derived_seed, generator

__all__ = ["METHODS", "Explanation", "Method", "Scene", "attribution_method", "explain", "resolve_method"]

PASSES = 400
_ROWS = 64
_SAMPLES = 50  # of SmoothGrad and Integrated Gradients


@dataclass(frozen=True)
class Scene:
    """One image to explain, with the network and the class.

    Args:
        x: (1, C, H, W), in model units.
        target: the class that is explained; of a network with one output 0.
        network: in eval mode, from images (N, C, H, W) to logits (N, K).
        normalization: what was done to the image before the network, in image units, for fills.
        ident: random numbers of all methods derive from it: the image's index in its data set.
        outcome: what turns logits into the score that is explained: ``"probability"`` (softmax) or ``"sigmoid"``.
        forward: the same network in faster arithmetic, for passes without gradients; None takes the network.
        signed: whether the sign of a pixel matters (known effects), or its importance (insertion and deletion): then
            methods that take gradients of pixels add up absolute values over channels, which is how they do best.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).eval()
        >>> Scene(torch.zeros(1, 1, 2, 2), 1, net).scores(torch.zeros(3, 1, 2, 2)).shape
        torch.Size([3])
    """

    x: Tensor
    target: int
    network: nn.Module
    normalization: Normalization = field(default_factory=Normalization)
    ident: int = 0
    outcome: str = "probability"
    forward: Callable[[Tensor], Tensor] | None = None
    signed: bool = False

    def __post_init__(self) -> None:
        if self.outcome not in _OUTCOMES:
            raise unknown_name("outcome", self.outcome, _OUTCOMES)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.x.shape[2]), int(self.x.shape[3])

    @property
    def logits(self) -> Callable[[Tensor], Tensor]:
        """What passes without gradients go through."""
        return self.network if self.forward is None else self.forward

    def scores(self, images: Tensor) -> Tensor:
        """Score (N,) of the class for images (N, C, H, W), without gradients."""
        with torch.no_grad():
            return _OUTCOMES[self.outcome](self.logits(images))[:, self.target]

    def probability(self, images: Tensor) -> Tensor:
        """Scores of all classes (N, K), with gradients."""
        return _OUTCOMES[self.outcome](self.network(images))

    def filled(self, name: str) -> Tensor:
        """The image with every pixel replaced: a fill of :class:`~ce_plugin.interventions.PixelMask`, (1, C, H, W)."""
        return PixelMask(name, normalization=self.normalization).values(self.x, Context(ids=(self.ident,)))


_OUTCOMES: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": lambda logits: logits.softmax(1),
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class Method:
    """A way to explain: from a scene and a number of passes to a map (H, W).

    Args:
        name: in tables.
        run: from a scene, passes and the method's own settings to a map (H, W), or (1, C, h, w), of which channels are
            added and that is enlarged.
        budget: whether it does as many passes as it is told; the others know how many they need.
        fixed: whether it explains one network, whichever the scene's is.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> METHODS["saliency"](Scene(torch.rand(1, 1, 4, 4), 1, net)).shape
        torch.Size([4, 4])
    """

    name: str
    run: Callable[..., Tensor]
    budget: bool = False
    fixed: bool = False

    def __call__(self, scene: Scene, passes: int = PASSES, **settings: Any) -> Tensor:
        """The map (H, W) of the scene, float32, on the CPU."""
        return _as_map(self.run(scene, passes, **settings), scene.size, self.name)


@dataclass(frozen=True)
class Explanation:
    """A map with what it took.

    Args:
        map: (H, W).
        passes: forward passes of one image through the whole network, counted as they were made: the clean one too, a
            backward pass as two more; passes through a part of the network by its share of operations.
        seconds: of wall time.
    """

    map: Tensor
    passes: float
    seconds: float


def explain(method: Method, scene: Scene, passes: int = PASSES, **settings: Any) -> Explanation:
    """A method's map of a scene; its passes are counted while it works.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> explain(METHODS["saliency"], Scene(torch.rand(1, 1, 4, 4), 1, net)).passes
        3.0
    """
    counter, forward = _Counter(scene.network), scene.forward
    with counter.counting():
        start = time.perf_counter()
        counted = scene if forward is None else replace(scene, forward=counter.counted(forward))
        found = method(counted, passes, **settings)
        seconds = time.perf_counter() - start
    return Explanation(found, counter.passes, seconds)


def resolve_method(method: object, name: str = "") -> Method:
    """A method by its name in :data:`METHODS`, or one made of a Captum attribution or a callable.

    Args:
        method: a name; a :class:`Method`; a class of Captum's that is made of a network alone, or an object with
            Captum's ``attribute(inputs, target=...)``; or a callable ``explain(x, target)`` that returns a map (H, W)
            or (1, C, h, w). Objects and callables explain their own network only.
        name: in tables; None takes the class's or function's own.

    Raises:
        UnknownNameError: no method has this name.
        ArgumentError: ``method`` is none of these.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
        >>> resolve_method(Saliency(net)).name, resolve_method(lambda x, target: x, "input").name
        ('Saliency', 'input')
    """
    if isinstance(method, Method):
        return method
    if isinstance(method, str):
        if method not in METHODS:
            raise unknown_name("method", method, METHODS)
        return METHODS[method]
    if hasattr(method, "attribute"):
        return attribution_method(method, name)
    if not callable(method):
        wanted = "a name, a Captum attribution or a callable"
        raise ArgumentError(expected("method", wanted, repr(method)))
    called: Callable[[Tensor, int], Tensor] = method
    own = name or getattr(called, "__name__", "callable")
    return Method(own, lambda scene, passes: called(scene.x, scene.target), fixed=True)


def attribution_method(explainer: Any, name: str = "", **options: Any) -> Method:
    """A method of a Captum attribution, a class or an object, with the options of its ``attribute``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        >>> method = attribution_method(LayerGradCam(net, net[0]), relu_attributions=True)
        >>> method(Scene(torch.rand(1, 1, 8, 8), 1, net)).shape
        torch.Size([8, 8])
    """

    def run(scene: Scene, passes: int) -> Tensor:
        with state_guard(scene.network, seed=derived_seed(0, scene.ident, "attribution")):
            asked = explainer(scene.network) if made else explainer
            found: Tensor = asked.attribute(scene.x.clone().requires_grad_(), target=scene.target, **options)
        return found

    made = isinstance(explainer, type)
    return Method(name or (explainer if made else type(explainer)).__name__, run, fixed=not made)


def _as_map(found: Tensor, size: tuple[int, int], name: str) -> Tensor:
    """A method's result as a map: channels added, enlarged bilinearly."""
    if not isinstance(found, Tensor) or found.dim() not in (2, 4) or (found.dim() == 4 and len(found) != 1):
        got = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ModelError(expected("method", f"one whose maps are (H, W) or (1, C, h, w) ({name})", got))
    flat = found.detach().float().cpu()
    flat = flat.sum(1)[0] if flat.dim() == 4 else flat
    if tuple(flat.shape) != size:
        flat = interpolate(flat[None, None], size, mode="bilinear", align_corners=False)[0, 0]
    return flat


# Ours


def _causal_effect(scene: Scene, passes: int) -> Tensor:
    """With default settings, which take a gradient: of the network itself."""
    explainer = CausalEffect(scene.network, outcome=scene.outcome, normalization=scene.normalization)
    found: Tensor = explainer.attribute(scene.x, target=scene.target, ids=[scene.ident], passes=passes)
    return found[0, 0]


def _random_mask(scene: Scene, passes: int) -> Tensor:
    """The paper's design: each patch of 14 x 14 masked with probability 0.1."""
    explainer = CausalEffect(
        scene.logits,
        PixelMask(("zero", "mean", "blur"), normalization=scene.normalization),
        RandomMask(0.1),
        outcome=scene.outcome,
        normalization=scene.normalization,
    )
    cells = _cells(scene, min(14, *scene.size))
    found: Tensor = explainer.attribute(
        scene.x, target=scene.target, feature_mask=cells, ids=[scene.ident], passes=passes
    )
    return found[0, 0]


def _causal_effect_map(scene: Scene, passes: int) -> Tensor:
    """CEM of the logit at the last value with positions."""
    found: Tensor = CausalEffectMap(scene.network).attribute(scene.x, scene.target)
    return found


# Gradients


def _saliency(scene: Scene, passes: int, output: str = "logit") -> Tensor:
    """The absolute gradient, the greatest over channels."""
    found = Saliency(_output(scene, output)).attribute(_leaf(scene), scene.target, abs=not scene.signed)
    return _over_channels(found, scene, greatest=True)


def _smooth_grad(scene: Scene, passes: int, sigma: float = 0.6) -> Tensor:
    """The mean of Saliency under noise, of so many units of the network's input."""
    with state_guard(scene.network, seed=derived_seed(0, scene.ident, "smoothgrad")):
        found = NoiseTunnel(Saliency(scene.network)).attribute(
            _leaf(scene), nt_type="smoothgrad", nt_samples=_SAMPLES, nt_samples_batch_size=_SAMPLES // 2,
            stdevs=sigma, target=scene.target, abs=not scene.signed,
        )  # fmt: skip
    return _over_channels(found, scene, greatest=True)


def _input_x_gradient(scene: Scene, passes: int) -> Tensor:
    """Of the logit."""
    return _over_channels(InputXGradient(scene.network).attribute(_leaf(scene), scene.target), scene)


def _integrated_gradients(scene: Scene, passes: int, baseline: str = "mean") -> Tensor:
    """Of the score, from the image's mean colour or another fill."""
    found = IntegratedGradients(scene.probability).attribute(
        scene.x, scene.filled(baseline), scene.target, n_steps=_SAMPLES, internal_batch_size=_SAMPLES // 2
    )
    return _over_channels(found, scene)


def _output(scene: Scene, output: str) -> Callable[[Tensor], Tensor]:
    """What a gradient is taken of: the logit or the score."""
    return scene.network if output == "logit" else scene.probability


def _leaf(scene: Scene) -> Tensor:
    return scene.x.clone().requires_grad_()


def _over_channels(found: Tensor, scene: Scene, *, greatest: bool = False) -> Tensor:
    if scene.signed:
        return found[0].sum(0)
    return found[0].abs().amax(0) if greatest else found[0].abs().sum(0)


# The last value with positions


def _grad_cam(scene: Scene, passes: int, output: str = "logit") -> Tensor:
    """Captum's, with its ReLU unless the sign matters."""
    module, at_input = _last(scene)
    found: Tensor = LayerGradCam(_output(scene, output), module).attribute(
        scene.x, scene.target, attribute_to_layer_input=at_input, relu_attributions=not scene.signed
    )
    return found


def _cam(scene: Scene, name: str) -> Tensor:
    """A method of pytorch-grad-cam."""
    try:
        library: Any = importlib.import_module("pytorch_grad_cam")
        targets: Any = importlib.import_module("pytorch_grad_cam.utils.model_targets")
    except ImportError as error:
        hint = 'Install it: pip install "ce-plugin[compare]"'
        raise ModelError(expected("method", f"an installed one ({name})", f"{error}", hint)) from error
    # Its progress bars cannot be turned off.
    with (
        _with_identity(scene) as module,
        contextlib.redirect_stderr(io.StringIO()),
        getattr(library, name)(scene.network, [module], **_cam_options(name)) as explainer,
    ):
        explainer.batch_size = _ROWS // 2
        found = explainer(scene.x.clone(), [targets.ClassifierOutputTarget(scene.target)])
    return torch.from_numpy(found)[0]


def _cam_options(name: str) -> dict[str, Any]:
    """AblationCAM's own layer writes -1e7 and lower where a channel is to be zero, unless the lowest value is 0."""
    if name != "AblationCAM":
        return {}
    base: Any = importlib.import_module("pytorch_grad_cam.ablation_layer").AblationLayer

    class ZeroAblation(base):  # type: ignore[misc]
        def __call__(self, x: Tensor) -> Tensor:
            rows: Tensor = self.activations
            rows[torch.arange(len(rows)), torch.as_tensor(self.indices[: len(rows)]).long()] = 0
            return rows

    return {"ablation_layer": ZeroAblation()}


# Found once for a network, like a layer that a user names.
_LAST: MutableMapping[nn.Module, tuple[nn.Module, bool, int] | None] = weakref.WeakKeyDictionary()


def _last(scene: Scene) -> tuple[nn.Module, bool]:
    """The module whose value is the last one with positions, and whether its input is meant."""
    if scene.network not in _LAST:
        _LAST[scene.network] = last_map([scene.network], lambda: [scene.network(scene.x)])
    found = _LAST[scene.network]
    if found is None or found[2] > 0:
        came = "none" if found is None else "a module that is called several times"
        hint = "Take methods that ask the input: occlusion, rise, causal-effect."
        raise ModelError(expected("network", "one whose positions are pooled away at the end", came, hint))
    return found[0], found[1]


@contextlib.contextmanager
def _with_identity(scene: Scene) -> Iterator[nn.Module]:
    """An identity in the network at the last value with positions, so that it is a module's output; taken out again."""
    module, at_input = _last(scene)
    identity = nn.Identity()
    pair = nn.Sequential(identity, module) if at_input else nn.Sequential(module, identity)
    places = [
        (parent, name)
        for parent in list(scene.network.modules())
        for name, child in parent.named_children()
        if child is module
    ]
    with state_guard(scene.network):
        try:
            for parent, name in places:
                setattr(parent, name, pair.eval())
            yield identity
        finally:
            for parent, name in places:
                setattr(parent, name, module)


# Black boxes


def _occlusion(scene: Scene, passes: int, window: float = 64 / 224, baseline: str = "zero") -> Tensor:
    """Windows of this part of a side, larger where few passes must cover the image, as close as the passes allow."""
    if passes < 2:
        raise ArgumentError(expected("passes", "2 or more", passes))
    rows = math.isqrt(passes - 1)
    numbers = rows, (passes - 1) // rows
    sides = [max(round(window * side), math.ceil(side / n)) for side, n in zip(scene.size, numbers, strict=True)]
    strides = [
        max(1, math.ceil((side - own) / max(1, n - 1))) for side, own, n in zip(scene.size, sides, numbers, strict=True)
    ]
    channels = scene.x.shape[1]
    found: Tensor = Occlusion(scene.scores).attribute(
        scene.x,
        (channels, *sides),
        strides=(channels, *strides),
        baselines=scene.filled(baseline),
        perturbations_per_eval=_ROWS,
    )
    return found[0, 0]


def _rise(scene: Scene, passes: int, cells: int = 7, baseline: str = "mean") -> Tensor:
    """Petsiuk et al. 2018 (arXiv 1806.07421): the plain average of soft masks, weighted by the score of what they show.

    Cells are shown or not as RandomMask(0.5) says; grids are enlarged to one cell more than the image and shifted.
    """
    draw = generator(0, scene.ident, "rise")
    height, width = scene.size
    cell = [-(-side // cells) for side in scene.size]
    grids = ~RandomMask(0.5, n_trials=max(2, passes)).assignments(cells**2, example=scene.ident)[:passes]
    shifts = torch.stack([torch.randint(c, (passes,), generator=draw) for c in cell], 1).tolist()
    other, total = scene.filled(baseline), torch.zeros(scene.size)
    for start in range(0, passes, _ROWS):
        some = grids[start : start + _ROWS].float().reshape(-1, 1, cells, cells)
        large = interpolate(some, [(cells + 1) * c for c in cell], mode="bilinear", align_corners=False)
        places = shifts[start : start + _ROWS]
        cut = [m[:, a : a + height, b : b + width] for m, (a, b) in zip(large, places, strict=True)]
        masks = torch.stack(cut).to(scene.x)
        shown = scene.scores(scene.x * masks + other * (1 - masks))
        total += (shown[:, None, None] * masks[:, 0]).sum(0).cpu()
    return total / (passes * 0.5)


def _kernel_shap(scene: Scene, passes: int, cells: int = 5, baseline: str = "mean") -> Tensor:
    """Captum's, on the cells of a grid."""
    return _surrogate(KernelShap(scene.scores), scene, passes, cells, baseline)


def _lime(scene: Scene, passes: int, cells: int = 5, baseline: str = "mean", alpha: float = 1.0) -> Tensor:
    """Captum's, on the cells of a grid; a ridge regression, as that of images in LIME's own package."""
    surrogate: Any = _Ridge(alpha)
    return _surrogate(Lime(scene.scores, interpretable_model=surrogate), scene, passes, cells, baseline)


class _Ridge:
    """A weighted ridge regression with an intercept, as Captum's Lime asks for one."""

    def __init__(self, alpha: float) -> None:
        self.alpha, self.slopes = alpha, torch.zeros(1, 0)

    def fit(self, batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Samples (T, U), scores (T,) and weights (T,)."""
        a, y, w = (part.double() for part in next(iter(batches)))
        y, w = y.reshape(-1, 1), w.reshape(-1, 1)
        a, y = a - (w * a).sum(0) / w.sum(), y - (w * y).sum() / w.sum()
        inner = a.T @ (w * a) + self.alpha * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        self.slopes = torch.linalg.solve(inner, a.T @ (w * y)).T.float()

    def representation(self) -> Tensor:
        """(1, U)."""
        return self.slopes


def _surrogate(explainer: Any, scene: Scene, passes: int, cells: int, baseline: str) -> Tensor:
    if passes < 3:
        raise ArgumentError(expected("passes", "3 or more", passes))
    with state_guard(scene.network, seed=derived_seed(0, scene.ident, "surrogate")):
        found: Tensor = explainer.attribute(
            scene.x, baselines=scene.filled(baseline), feature_mask=_cells(scene, cells), n_samples=passes,
            perturbations_per_eval=_ROWS,
        )  # fmt: skip
    return found[0, 0]


def _cells(scene: Scene, along: int) -> Tensor:
    """Ids of the cells of a grid, (1, 1, H, W), in all channels alike."""
    rows, columns = (torch.arange(side) * along // side for side in scene.size)
    return (rows[:, None] * along + columns)[None, None].to(scene.x.device)


# Baselines


def _random(scene: Scene, passes: int) -> Tensor:
    """A number for each pixel."""
    return torch.rand(scene.size, generator=generator(0, scene.ident, "random"))


def _centre(scene: Scene, passes: int) -> Tensor:
    """A Gaussian at the centre, with a quarter of the side as its deviation."""
    rows, columns = ((torch.arange(side) - (side - 1) / 2) / (side / 4) for side in scene.size)
    return torch.exp(-0.5 * (rows[:, None] ** 2 + columns**2))


METHODS: dict[str, Method] = {
    "causal-effect": Method("CausalEffect", _causal_effect, budget=True),
    "random-mask": Method("CausalEffect, RandomMask(0.1)", _random_mask, budget=True),
    "causal-effect-map": Method("CausalEffectMap", _causal_effect_map),
    "saliency": Method("Saliency", _saliency),
    "smoothgrad": Method("SmoothGrad", _smooth_grad),
    "input-x-gradient": Method("Input x Gradient", _input_x_gradient),
    "integrated-gradients": Method("Integrated Gradients", _integrated_gradients),
    "grad-cam": Method("Grad-CAM", _grad_cam),
    "ablation-cam": Method("AblationCAM", lambda scene, passes: _cam(scene, "AblationCAM")),
    "score-cam": Method("ScoreCAM", lambda scene, passes: _cam(scene, "ScoreCAM")),
    "occlusion": Method("Occlusion", _occlusion, budget=True),
    "rise": Method("RISE", _rise, budget=True),
    "kernel-shap": Method("KernelSHAP", _kernel_shap, budget=True),
    "lime": Method("LIME", _lime, budget=True),
    "random": Method("random", _random),
    "centre": Method("centre", _centre),
}
"""The methods by the names that the command line takes. Settings of the peers were chosen by insertion and deletion on
photographs that no table shows (``benchmarks/results/faithfulness_choosing.md``)."""


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts passes through a network: whole ones by rows, others by operations.

    A whole pass is a call of the network itself. What is multiplied with its weights beside such calls (a part of the
    network, from a layer on) counts as a share of the operations of a whole pass. A backward pass counts two for each
    row, however far it goes.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.network = network
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        self.rows = self.backward = self.depth = 0
        self.whole = self.parts = 0.0

    @property
    def passes(self) -> float:
        """So far."""
        share = self.parts * self.rows / self.whole if self.whole else 0.0
        return round(self.rows + self.backward + share, 2)

    def counted(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Another form of the network, each of whose calls is a whole pass."""

        def call(images: Tensor) -> Tensor:
            self.rows += len(images)
            self.depth += 1
            try:
                return forward(images)
            finally:
                self.depth -= 1

        return call

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, passes are counted."""
        # Hooks of all modules: one of the network's own would be part of what is traced.
        with contextlib.ExitStack() as stack:
            for handle in (
                register_module_forward_pre_hook(self._before),
                register_module_forward_hook(self._after, always_call=True),
            ):
                stack.callback(handle.remove)
            stack.enter_context(self)
            yield

    def _before(self, module: nn.Module, args: Sequence[Any]) -> None:
        if module is self.network:
            if not self.depth:  # another form of the network may call it
                self.rows += len(args[0]) if args and isinstance(args[0], Tensor) else 1
            self.depth += 1

    def _after(self, module: nn.Module, args: object, output: object) -> None:
        if module is not self.network:
            return
        self.depth -= 1
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._went_back)  # type: ignore[no-untyped-call]

    def _went_back(self, gradient: Tensor) -> None:
        self.backward += 2 * len(gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func._overloadpacket
        if packet not in flop_registry:
            with self:  # what is made of operations that are counted
                out = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out
        out = func(*args, **kwargs)
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass
            operations = float(flop_registry[packet](*args, **kwargs, out_val=out))
            if self.depth:
                self.whole += operations
            elif any(isinstance(a, Tensor) and a.untyped_storage().data_ptr() in self.weights for a in args):
                self.parts += operations
        return out
