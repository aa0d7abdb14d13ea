"""Kinds of networks, and settings that they are used in: is each explained exactly, in full, or refused?

Each case is explained at a layer (its channels) and at its input (cells of a grid, or single values) by the engine's
own choice of route, by full passes, and by hand: with hooks and masks, without the package.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import multiprocessing
import pickle
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.works_with.verdicts import EXACT, FULL, REFUSED, Verdict, judged
from ce_plugin import CausalEffect, LayerCausalEffect
from ce_plugin.designs import OneAtATime
from ce_plugin.effects import Estimate
from ce_plugin.interventions import PixelMask
from ce_plugin.sites import LayerSite

SIDE, CLASSES, CELLS = 16, 5, 6


@dataclasses.dataclass
class Setup:
    """What is explained, and what the answer is compared with.

    Args:
        model: the forward function.
        inputs: one tensor, (N, ...), or a tuple of such.
        layer: the site inside: a name, or a site.
        plain: the network that is run by hand; None: the model itself.
        inside: the layer by hand; None: the layer of this name in ``plain``.
        options: of the explainers.
        args: additional forward arguments.
        call: further arguments of the calls.
        dtype: that the network computes in; None: that of the inputs.
        ask: has the explainer's answer to a call in the circumstances that the case is about.
        context: what everything runs in.
    """

    model: Callable[..., Any]
    inputs: Tensor | tuple[Tensor, ...]
    layer: str | LayerSite = "2"
    plain: Callable[..., Any] | None = None
    inside: nn.Module | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    args: tuple[Any, ...] = ()
    call: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype | None = None
    ask: Callable[[Any, dict[str, Any]], Estimate] = lambda explainer, call: explainer.estimate(**call)
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclasses.dataclass(frozen=True)
class Case:
    """A row of the table.

    Args:
        name, section: of the row.
        make: sets it up.
        layer, at_input: the verdicts that it must have.
        reason: a pattern that the reasons must match, where a verdict is not "exact".
        needs: a module without which the row is left out.
    """

    name: str
    section: str
    make: Callable[[], Setup]
    layer: str = EXACT
    at_input: str = EXACT
    reason: str = ""
    needs: str = "torch"


CASES: dict[str, Case] = {}


def case(
    name: str, section: str, layer: str = EXACT, at_input: str = EXACT, reason: str = "", needs: str = "torch"
) -> Callable[[Callable[[], Setup]], Callable[[], Setup]]:
    """Register a row."""

    def register(make: Callable[[], Setup]) -> Callable[[], Setup]:
        CASES[name] = Case(name, section, make, layer, at_input, reason, needs)
        return make

    return register


def run(case: Case) -> tuple[Verdict, Verdict]:
    """The verdicts at the layer and at the input."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        setup = case.make()
        with setup.context():
            return _at_layer(setup), _at_input(setup)


def _at_layer(setup: Setup) -> Verdict:
    site = setup.layer if isinstance(setup.layer, LayerSite) else LayerSite(setup.layer)
    call = {"inputs": setup.inputs, "additional_forward_args": setup.args or None, **setup.call}

    def estimate(engine: str) -> Estimate:
        explainer = LayerCausalEffect(setup.model, site, outcome=None, engine=engine, **setup.options)
        found: Estimate = explainer.estimate(**call) if engine == "full" else setup.ask(explainer, call)
        return found

    return judged(str(site.layer), estimate, "auto", lambda: _layer_by_hand(setup, site), _dtype(setup))


def _at_input(setup: Setup) -> Verdict:
    masks = _cells(setup.inputs)
    mask = masks if isinstance(setup.inputs, tuple) else masks[0]
    call = {"inputs": setup.inputs, "additional_forward_args": setup.args or None, "feature_mask": mask, **setup.call}

    def estimate(engine: str) -> Estimate:
        options: dict[str, Any] = {"outcome": None, "engine": engine, **setup.options}
        explainer = CausalEffect(setup.model, PixelMask("zero"), OneAtATime(), **options)
        found: Estimate = explainer.estimate(**call) if engine == "full" else setup.ask(explainer, call)
        return found

    return judged("input", estimate, "suffix", lambda: _input_by_hand(setup, masks), _dtype(setup))


def _dtype(setup: Setup) -> torch.dtype:
    first = setup.inputs[0] if isinstance(setup.inputs, tuple) else setup.inputs
    return setup.dtype or first.dtype


def _cells(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A number for each value: cells of a grid over what follows the channels of images and volumes."""
    masks, first = [], 0
    for x in inputs if isinstance(inputs, tuple) else (inputs,):
        mask = (
            torch.zeros(1, 1, *x.shape[2:], dtype=torch.int64) if x.dim() > 3 else torch.zeros(1, *x.shape[1:]).long()
        )
        for dim in range(2 if x.dim() > 3 else 1, x.dim()):
            size = x.shape[dim]
            index = torch.arange(size) * min(CELLS, size) // size
            mask = mask * min(CELLS, size) + index.view(-1, *[1] * (x.dim() - dim - 1))
        masks.append(mask + first)
        first += int(mask.max()) + 1
    return tuple(masks)


def _outputs(setup: Setup, inputs: tuple[Tensor, ...]) -> Tensor:
    """What the network returns, by hand."""
    model, wanted = setup.plain or setup.model, setup.options.get("output")
    with torch.no_grad():
        found = model(*inputs, *setup.args)
    found = wanted(found) if callable(wanted) else found if wanted is None else found[wanted]
    return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found.clone()


def _input_by_hand(setup: Setup, masks: tuple[Tensor, ...]) -> Tensor:
    inputs = setup.inputs if isinstance(setup.inputs, tuple) else (setup.inputs,)
    clean, rows = _outputs(setup, inputs), []
    for unit in range(int(masks[-1].max()) + 1):
        changed = [x.masked_fill(mask == unit, 0) for x, mask in zip(inputs, masks, strict=True)]
        rows.append(_outputs(setup, tuple(changed)) - clean)
    return torch.stack(rows, 1)


def _layer_by_hand(setup: Setup, site: LayerSite) -> Tensor:
    inputs = setup.inputs if isinstance(setup.inputs, tuple) else (setup.inputs,)
    model = setup.plain or setup.model
    module = setup.inside
    if module is None:
        assert isinstance(model, nn.Module)
        assert isinstance(site.layer, str)
        module = model.get_submodule(site.layer)
    unit, size, calls = -1, [0], [0]

    def zero(_: object, args: object, output: Any) -> Any:
        calls[0] += 1
        if calls[0] != (site.call or 0) + 1:
            return None
        value = output if site.element is None else output[site.element]
        dim = site.channel_dim if site.channel_dim is not None else 2 if value.dim() == 3 else 1
        size[0] = value.shape[dim]
        if unit < 0:
            return None
        value = value.clone()
        value.select(dim, unit).zero_()
        return value if site.element is None else (*output[: site.element], value, *output[site.element + 1 :])

    rows = []
    handle = module.register_forward_hook(zero)
    try:
        clean = _outputs(setup, inputs)
        for unit in range(size[0]):  # noqa: B007 - read by the hook
            calls[0] = 0
            rows.append(_outputs(setup, inputs) - clean)
    finally:
        handle.remove()
    return torch.stack(rows, 1)


# --- networks and inputs


def convolutional(channels: int = 3) -> nn.Sequential:
    """A small network of images."""
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3),
        nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, CLASSES),
    ).eval()  # fmt: skip


def images(n: int = 2, channels: int = 3) -> Tensor:
    """Some images."""
    return torch.rand(n, channels, SIDE, SIDE)


class Heads(nn.Module):
    """A network that returns logits and features in some form."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form, self.body, self.head = form, convolutional()[:-1], nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Any:
        features = self.body(x)
        return self.form(self.head(features), features)


@dataclasses.dataclass
class Output:
    """A dataclass as some networks return it."""

    logits: Tensor
    features: Tensor | None = None

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


SECTION = "Inputs and outputs"


@case("two images", SECTION)
def _two_images() -> Setup:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = convolutional()[:-1], convolutional()[:-1], nn.Linear(48, CLASSES)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head(torch.cat([self.left(a), self.right(b)], 1).tanh())

    return Setup(Two().eval(), (images(), images()), "left.4")


@case("an image and a vector", SECTION)
def _image_and_vector() -> Setup:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.side, self.head = convolutional()[:-1], nn.Linear(7, 24), nn.Linear(24, CLASSES)

        def forward(self, x: Tensor, v: Tensor) -> Tensor:
            return self.head(self.body(x) * self.side(v).sigmoid())

    return Setup(Mixed().eval(), (images(), torch.rand(2, 7)), "body.4")


@case("an additional argument", SECTION)
def _argument() -> Setup:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = convolutional()

        def forward(self, x: Tensor, power: int = 1) -> Tensor:
            return self.body(x) ** power

    return Setup(Scaled().eval(), images(), "body.4", args=(2,))


@case("a dict of outputs", SECTION)
def _dict() -> Setup:
    net = Heads(lambda logits, features: {"logits": logits, "features": features})
    return Setup(net.eval(), images(), "body.4", options={"output": "logits"})


@case("a tuple of outputs", SECTION)
def _tuple() -> Setup:
    net = Heads(lambda logits, features: (features, logits))
    return Setup(net.eval(), images(), "body.4", options={"output": 1})


@case("a dataclass of outputs", SECTION)
def _dataclass() -> Setup:
    return Setup(Heads(Output).eval(), images(), "body.4", options={"output": lambda found: found.logits})


@case("a ModelOutput of transformers", SECTION, needs="transformers")
def _model_output() -> Setup:
    from transformers.modeling_outputs import ImageClassifierOutput

    net = Heads(lambda logits, features: ImageClassifierOutput(logits=logits, hidden_states=(features,)))
    return Setup(net.eval(), images(), "body.4", options={"output": "logits"})


@case("one number for each example", SECTION)
def _one_number() -> Setup:
    net = nn.Sequential(*convolutional()[:-1], nn.Linear(24, 1)).eval()
    return Setup(net, images(), "4")


SECTION = "Kinds of networks"


class Sequences(nn.Module):
    """A recurrent network that reads its last output, or its last state."""

    def __init__(self, kind: type[nn.Module], state: bool = False) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(4, 6), kind(6, 8, batch_first=True), nn.Linear(8, CLASSES)
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        outputs, state = self.rnn(self.embed(x).relu())
        return self.head(state[0][-1] if self.state else outputs[:, -1])


@case("LSTM, before it", SECTION)
def _lstm() -> Setup:
    return Setup(Sequences(nn.LSTM).eval(), torch.rand(2, 7, 4), "embed")


@case("LSTM, its outputs", SECTION)
def _lstm_outputs() -> Setup:
    return Setup(Sequences(nn.LSTM).eval(), torch.rand(2, 7, 4), LayerSite("rnn", element=0))


@case("GRU, its outputs", SECTION)
def _gru() -> Setup:
    return Setup(Sequences(nn.GRU).eval(), torch.rand(2, 7, 4), LayerSite("rnn", element=0))


@case("LSTM whose state is read", SECTION)
def _lstm_state() -> Setup:
    return Setup(Sequences(nn.LSTM, state=True).eval(), torch.rand(2, 7, 4), "embed")


@case("Transformer encoder", SECTION, FULL, EXACT, "control flow")
def _encoder() -> Setup:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, CLASSES)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.encoder(self.embed(x)).mean(1))

    return Setup(Encoder().eval(), torch.rand(2, 7, 4), "encoder.layers.0")


@case("attention whose result is tested", SECTION, FULL, EXACT, "tuple")
def _attention() -> Setup:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, CLASSES)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.embed(x)
            y = self.attention(h, h, h, need_weights=False)
            if isinstance(y, tuple):
                y = y[0]
            return self.head((h + y).mean(1))

    return Setup(Block().eval(), torch.rand(2, 7, 4), "embed")


@case("convolutions over time (Conv1d)", SECTION)
def _conv1d() -> Setup:
    net = nn.Sequential(
        nn.Conv1d(4, 8, 5), nn.ReLU(), nn.Conv1d(8, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
        nn.Flatten(), nn.Linear(6, CLASSES),
    )  # fmt: skip
    return Setup(net.eval(), torch.rand(2, 4, 30), LayerSite("2", channel_dim=1))


@case("convolutions over volumes (Conv3d)", SECTION)
def _conv3d() -> Setup:
    net = nn.Sequential(
        nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(6, 8, 3),
        nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip
    return Setup(net.eval(), torch.rand(1, 1, 8, 8, 8), "4")


@case("fully connected", SECTION)
def _connected() -> Setup:
    net = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, CLASSES))
    return Setup(net.eval(), torch.rand(3, 6), "2")


@case("writes in place", SECTION)
def _in_place() -> Setup:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = self.relu(self.one(x))
            h += 1.0
            out = self.two(h)
            out += h
            return self.head(self.relu(out).mean((2, 3)))

    return Setup(Writes().eval(), images(), "two")


@case("keeps its features in an attribute", SECTION)
def _keeps() -> Setup:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = convolutional()[:-1], nn.Linear(24, CLASSES)
            self.kept: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.body(x)
            return self.head(self.kept)

    return Setup(Keeps().eval(), images(), "body.4")


@case("one layer called twice", SECTION)
def _twice() -> Setup:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.two(self.two(self.one(x)).relu()).relu().mean((2, 3)))

    return Setup(Twice().eval(), images(), LayerSite("two", call=0))


@case("branches on values", SECTION, FULL, FULL, "float")
def _branches() -> Setup:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = convolutional()[:-1], nn.Linear(24, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return self.head(h if float(h.sum()) > -1e9 else -h)

    return Setup(Branches().eval(), images(), "body.4")


@case("takes one example at a time (`perturbations_per_eval=1`)", SECTION)
def _one_at_a_time() -> Setup:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn, self.head = nn.Linear(4, 6), nn.LSTM(6, 8, batch_first=True), nn.Linear(8, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(1, 1, 8)
            outputs, _ = self.rnn(self.embed(x), (state, state.clone()))
            return self.head(outputs[:, -1])

    return Setup(Single().eval(), torch.rand(1, 7, 4), "embed", call={"perturbations_per_eval": 1})


@case("draws random numbers in eval mode", SECTION, REFUSED, REFUSED, "deterministic")
def _random() -> Setup:
    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = convolutional()[:-1], nn.Linear(24, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.dropout(self.body(x), 0.5, training=True))

    return Setup(Drops().eval(), images(), "body.4")


SECTION = "Wrapped, compiled, quantised, adapted"


def _wrapped(wrap: Callable[[nn.Module], Callable[..., Any]], layer: str = "4", **options: Any) -> Setup:
    """A convolutional network behind something, compared with the network itself."""
    net = convolutional()
    plain = copy.deepcopy(net)
    return Setup(wrap(net), images(), layer, plain, plain[4], **options)


@case("a function around a network", SECTION, FULL, FULL, "a function, not a module")
def _function() -> Setup:
    return _wrapped(lambda net: lambda x: net(x))


@case("ART's PyTorchClassifier", SECTION, needs="art")
def _art() -> Setup:
    from art.estimators.classification import PyTorchClassifier

    def wrap(net: nn.Module) -> Any:
        return PyTorchClassifier(net, nn.CrossEntropyLoss(), (3, SIDE, SIDE), CLASSES, clip_values=(0.0, 1.0))

    return _wrapped(wrap, "model.4")


@case("torch.jit.script", SECTION, REFUSED, FULL, "TorchScript|scripted")
def _scripted() -> Setup:
    return _wrapped(torch.jit.script)


@case("torch.jit.trace", SECTION, REFUSED, FULL, "TorchScript|scripted")
def _traced() -> Setup:
    return _wrapped(lambda net: torch.jit.trace(net, images()))


@case("torch.jit.freeze", SECTION, REFUSED, FULL, "TorchScript|scripted")
def _frozen() -> Setup:
    return _wrapped(lambda net: torch.jit.freeze(torch.jit.script(net)))


@case("a scripted part", SECTION)
def _scripted_part() -> Setup:
    def wrap(net: nn.Module) -> nn.Module:
        return nn.Sequential(*net[:8], torch.jit.script(net[8]))

    return _wrapped(wrap)


@case("torch.fx.symbolic_trace", SECTION)
def _graph_module() -> Setup:
    return _wrapped(lambda net: torch.fx.symbolic_trace(net))


@case('torch.compile(backend="eager")', SECTION, FULL, FULL, "compiled")
def _compiled() -> Setup:
    torch._dynamo.reset()
    return _wrapped(lambda net: torch.compile(net, backend="eager"), "_orig_mod.4")


@case('torch.compile(backend="aot_eager")', SECTION, FULL, FULL, "compiled")
def _compiled_aot() -> Setup:
    torch._dynamo.reset()
    return _wrapped(lambda net: torch.compile(net, backend="aot_eager"), "_orig_mod.4")


@case("network.compile()", SECTION, FULL, FULL, "compiled")
def _compiled_in_place() -> Setup:
    def wrap(net: nn.Module) -> nn.Module:
        net.compile(backend="eager")
        return net

    torch._dynamo.reset()
    return _wrapped(wrap)


@case("DataParallel", SECTION)
def _data_parallel() -> Setup:
    return _wrapped(nn.DataParallel, "module.4")


@case("DistributedDataParallel", SECTION)
def _distributed() -> Setup:
    folder = tempfile.TemporaryDirectory()
    store = Path(folder.name, "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)

    @contextmanager
    def group() -> Iterator[None]:
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()
            folder.cleanup()

    return _wrapped(nn.parallel.DistributedDataParallel, "module.4", context=group)


@case("dynamic quantisation (`perturbations_per_eval=1`)", SECTION)
def _quantised() -> Setup:
    # Values are rounded to steps that depend on the largest in the batch: only rows that go alone can be compared.
    net = torch.ao.quantization.quantize_dynamic(convolutional(), {nn.Linear}, torch.qint8)
    return Setup(net, images(1), "4", call={"perturbations_per_eval": 1})


@case("static quantisation", SECTION, REFUSED, EXACT, "quantised")
def _statically_quantised() -> Setup:
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    engine = torch.backends.quantized.engine
    prepared = quantize_fx.prepare_fx(convolutional(), get_default_qconfig_mapping(engine), (images(),))
    prepared(images(8))
    return Setup(quantize_fx.convert_fx(prepared), images(), "4")


class LowRank(nn.Module):
    """A linear layer with an adapter of low rank, as LoRA puts it there."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


@case("LoRA, written by hand", SECTION)
def _lora() -> Setup:
    net = convolutional()
    net[8] = LowRank(net[8])
    return Setup(net, images(), "4")


@case("LoRA of peft", SECTION, needs="peft")
def _peft() -> Setup:
    from peft import LoraConfig, get_peft_model

    net = get_peft_model(convolutional(), LoraConfig(r=2, target_modules=["4", "8"], init_lora_weights=False))
    return Setup(net.eval(), images(), "base_model.model.2")


@case("weight_norm and spectral_norm", SECTION)
def _parametrised() -> Setup:
    net = convolutional()
    net[4] = nn.utils.parametrizations.weight_norm(net[4])
    net[8] = nn.utils.parametrizations.spectral_norm(net[8])
    return Setup(net.eval(), images(), "2")


@case("pruned", SECTION)
def _pruned() -> Setup:
    from torch.nn.utils import prune

    net = convolutional()
    prune.l1_unstructured(net[4], "weight", 0.5)
    return Setup(net, images(), "2")


@case("a user's own hooks", SECTION)
def _hooks() -> Setup:
    net = convolutional()
    net[4].register_forward_hook(lambda module, args, output: output * 2.0)
    return Setup(net, images(), "2")


SECTION = "Precision and memory"


@case("float64", SECTION)
def _float64() -> Setup:
    return Setup(convolutional().double(), images().double(), "4")


@case("bfloat16", SECTION)
def _bfloat16() -> Setup:
    return Setup(convolutional().bfloat16(), images().bfloat16(), "4")


@case("float16", SECTION)
def _float16() -> Setup:
    return Setup(convolutional().half(), images().half(), "4")


@case("autocast", SECTION)
def _autocast() -> Setup:
    low = torch.bfloat16
    return Setup(convolutional(), images(), "4", dtype=low, context=lambda: torch.autocast("cpu", dtype=low))


@case("channels_last", SECTION)
def _channels_last() -> Setup:
    layout = torch.channels_last
    return Setup(convolutional().to(memory_format=layout), images().contiguous(memory_format=layout), "4")


@case("the meta device", SECTION, REFUSED, REFUSED)
def _meta() -> Setup:
    return Setup(convolutional().to("meta"), images().to("meta"), "4")


SECTION = "Where it runs"


@case("in training mode before and after", SECTION)
def _training() -> Setup:
    net = convolutional()
    return Setup(copy.deepcopy(net).train(), images(), "4", net, net[4])


@case("inside torch.inference_mode", SECTION)
def _inference_mode() -> Setup:
    return Setup(convolutional(), images(), "4", context=torch.inference_mode)


@case("four threads, one network", SECTION)
def _threads() -> Setup:
    def ask(explainer: Any, call: dict[str, Any]) -> Estimate:
        found: list[Estimate] = []
        threads = [threading.Thread(target=lambda: found.append(explainer.estimate(**call))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if len(found) < 4 or not all(torch.equal(each.effect, found[0].effect) for each in found):
            raise RuntimeError("the threads' answers differ, or one has none")
        return found[0]

    return Setup(convolutional(), images(), "4", ask=ask)


def _in_child(pickled: bytes) -> bytes:
    torch.set_num_threads(1)
    explainer, call = pickle.loads(pickled)
    return pickle.dumps(explainer.estimate(**call))


def _processes(method: str) -> Setup:
    """The explainer goes to another process, and the estimate comes back."""

    def ask(explainer: Any, call: dict[str, Any]) -> Estimate:
        with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as pool:
            found: Estimate = pickle.loads(pool.submit(_in_child, pickle.dumps((explainer, call))).result())
        return found

    return Setup(convolutional(), images(), "4", ask=ask)


@case("another process, forked", SECTION)
def _forked() -> Setup:
    return _processes("fork")


@case("another process, spawned", SECTION)
def _spawned() -> Setup:
    return _processes("spawn")


@case("pickled, copied and saved after use", SECTION)
def _pickled() -> Setup:
    def ask(explainer: Any, call: dict[str, Any]) -> Estimate:
        explainer.estimate(**call)
        again = copy.deepcopy(pickle.loads(pickle.dumps(explainer)))
        torch.save(explainer.forward.forward_func, io.BytesIO())
        found: Estimate = again.estimate(**call)
        return found

    return Setup(convolutional(), images(), "4", ask=ask)
