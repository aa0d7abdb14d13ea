"""Runs over data sets: in one process, or by Ray Data; both write the same shards by the same code."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ce_plugin import errors
from ce_plugin.attribution._explainer import Explainer
from ce_plugin.errors import (
    ArgumentError,
    CEPluginError,
    FileError,
    InputError,
    check_integer,
    expected,
)
from ce_plugin.expected.rows import Classes, Evidences, Named, RowMaker, Sample
from ce_plugin.expected.table import EffectTable, check_pyarrow, write_shard
from ce_plugin.files import check_out, path_of, printable, reserved

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("ce_plugin")

# What reading a broken file raises: of the system, of Pillow (PNG: SyntaxError), and of our own readers.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError)
# Images of a file, and the most that their rows take, as they are held until it is written.
_SHARD, _SHARD_BYTES = 512, 1 << 28
# Of unreadable images, so many are logged.
_NAMED = 10


class Images(Protocol):
    """A data set: its items are images, pairs (image, label), or :class:`Sample`."""

    def __getitem__(self, index: int) -> Any: ...
    def __len__(self) -> int: ...


class Unreadable(NamedTuple):
    """An image that could not be read."""

    id: int
    reason: str


@dataclass(frozen=True)
class RayCluster:
    """Workers of a Ray cluster, each of which holds the network; a worker that dies is replaced, its images done again.

    Args:
        workers: number of them.
        num_cpus: of each; also its number of threads.
        num_gpus: of each; the network goes to the GPU.
        address: of a running cluster, such as ``"auto"``; None starts one on this machine.

    Raises:
        ArgumentError: such numbers cannot be.

    Example:
        >>> RayCluster(workers=2)
        RayCluster(workers=2, num_cpus=1, num_gpus=0, address=None)
    """

    workers: int = 2
    num_cpus: int = 1
    num_gpus: float = 0
    address: str | None = None

    def __post_init__(self) -> None:
        check_integer("workers", self.workers, least=1)
        check_integer("num_cpus", self.num_cpus, least=1)


def run(
    explainer: Explainer,
    data: Images,
    out: str | os.PathLike[str],
    *,
    given: Evidences = None,
    outcomes: Sequence[Named] | None = None,
    classes: Classes = "explained",
    ids: Sequence[int] | None = None,
    batch_size: int = 32,
    shard_size: int | None = None,
    loaders: int = 0,
    keep_images: bool = True,
    resume: bool = False,
    strict: bool = False,
    show_progress: bool = False,
    cluster: RayCluster | None = None,
) -> EffectTable:
    """The effects of every image of a data set, as a table on disk that answers questions without the network.

    An image's row depends on (seed, id) alone, so that any split of the work gives the same table, up to the rounding
    of other batches (1e-6 of the largest effect). What is written are whole shards; a run that was stopped, however,
    goes on with ``resume=True`` and does again at most the shards that were in work.

    Args:
        explainer: a :class:`~ce_plugin.LayerCausalEffect`, :class:`~ce_plugin.CausalEffect` or other explainer.
        data: a data set of torchvision or your own: items are images (C, H, W) as the network takes them, pairs
            (image, label), or :class:`Sample`. An image's id is its index.
        out: the folder of the run.
        given: evidence, or several by name: ``{"clean": None, "FGSM": Adversarial.fgsm(model), ...}``. Images of an
            ``Adversarial`` are rounded to the 256 levels of an image file.
        outcomes: what is measured, all in one run; None means the explainer's own outcome and the paper's
            "prediction_weighted" beside it.
        classes: whose effects are stored: "explained" (of each image the class that the network answers to it without
            evidence), "all", or a list of indices.
        ids: which images; None means all.
        batch_size: images that are estimated together.
        shard_size: images of a file; None means 512, or fewer where their rows would take more than 256 MB.
        loaders: processes that read images ahead; 0 reads them in between.
        keep_images: store the attacked images with their rows; their hashes are stored in any case.
        resume: the folder may hold a run of the same configuration, to which what is missing is added.
        strict: stop at the first image that cannot be read; else it is logged, counted and left out.
        show_progress: a progress bar.
        cluster: workers of Ray (the extra ``cluster``); None runs in this process.

    Returns:
        The table; ``skipped`` holds the images that could not be read, and why.

    Raises:
        FileError: the folder exists (without ``resume``), holds another run, or cannot be written; with ``strict`` an
            image that cannot be read.
        InputError: no image can be read; images that the network or the explainer cannot take; an id twice or out of
            range.
        ArgumentError: no data set, or an option that cannot be.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from ce_plugin import LayerCausalEffect
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> explainer = LayerCausalEffect(net, "1", outcome="log_odds")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = run(explainer, torch.rand(40, 3), folder + "/run", ids=range(16))
        ...     table = run(explainer, torch.rand(40, 3), folder + "/run2")
        >>> table
        EffectTable(40 images x clean; 4 units; log_odds, prediction_weighted)
    """
    check_integer("batch_size", batch_size, least=1)
    check_integer("loaders", loaders, least=0)
    if shard_size is not None:
        check_integer("shard_size", shard_size, least=1)
    check_pyarrow()
    maker = RowMaker(explainer=explainer, given=given, outcomes=outcomes, classes=classes, keep_images=keep_images)
    wanted = _checked_ids(ids, data)
    reader = _Reader(data, strict)
    folder = Path(os.path.abspath(path_of(out, "out")))  # workers may be elsewhere
    with ExitStack() as stack:
        # Of two runs on one folder the second is refused.
        stack.enter_context(reserved(check_out(folder, force=resume) / "rows", force=resume))
        # One image says what the table holds; before any other is read.
        one = maker.rows([_first(reader, wanted)], wanted[:1])
        size = min(_SHARD, max(1, _SHARD_BYTES // one.nbytes)) if shard_size is None else shard_size
        table = EffectTable.created(folder, maker.configuration(_fingerprint(data)), maker.about)
        plan = _shards(table.missing(wanted), size)
        job = _Job(maker, reader, folder, table.configuration, batch_size)
        skipped: dict[int, str] = {}
        with tqdm(total=len(wanted), initial=len(wanted) - sum(map(len, plan)), disable=not show_progress) as bar:
            for done, unreadable in job.local(plan, loaders) if cluster is None else job.on_cluster(plan, cluster):
                bar.update(done + len(unreadable))
                for lost in unreadable:
                    skipped[lost.id] = lost.reason
                    if len(skipped) <= _NAMED:
                        logger.warning("image %d was left out: %s", lost.id, lost.reason)
    table = EffectTable(folder)
    table.skipped = skipped
    if len(skipped) > _NAMED:
        logger.warning("%d images were left out", len(skipped))
    return table


@dataclass(frozen=True)
class _Job:
    """What every process needs to write shards.

    Attributes:
        maker: makes rows.
        reader: reads images.
        folder: of the run.
        configuration: of the run.
        batch_size: images that are estimated together.
    """

    maker: RowMaker
    reader: _Reader
    folder: Path
    configuration: dict[str, Any]
    batch_size: int

    def local(self, plan: list[list[int]], loaders: int = 0) -> Iterator[tuple[int, list[Unreadable]]]:
        """Write shard by shard; images are read ahead by ``loaders`` processes."""
        batches = [self._batches(shard) for shard in plan]
        loader: Iterable[Any] = DataLoader(
            cast("Dataset[Any]", self.reader),
            batch_sampler=list(itertools.chain.from_iterable(batches)),
            num_workers=loaders,
            collate_fn=_as_they_are,
            # A generator of its own: the global one is not moved.
            generator=torch.Generator(),
        )
        read = iter(loader)
        for shard, own in zip(plan, batches, strict=True):
            yield self._write(shard, own, itertools.islice(read, len(own)))

    def on_cluster(self, plan: list[list[int]], cluster: RayCluster) -> Iterator[tuple[int, list[Unreadable]]]:
        """Have workers of Ray write the shards, each one in one piece."""
        if not plan:
            return
        ray, started = _ray(cluster)
        for module in self._unimportable():
            ray.cloudpickle.register_pickle_by_value(module)
        # Held as long as workers may be started anew.
        job = ray.put(self)
        try:
            shards = ray.data.from_items([{"ids": ids} for ids in plan], override_num_blocks=len(plan))
            # One shard is one task: where a worker dies, Ray gives its shard to another.
            written = shards.map_batches(
                _Worker,
                batch_size=1,
                batch_format="numpy",
                fn_constructor_args=(job, cluster.num_cpus, bool(cluster.num_gpus)),
                compute=ray.data.ActorPoolStrategy(size=min(cluster.workers, len(plan))),
                num_cpus=cluster.num_cpus,
                num_gpus=cluster.num_gpus,
            )
            for row in written.iter_rows():
                said = json.loads(row["said"])
                if "error" in said:
                    raise getattr(errors, said["error"])(said["message"])
                yield said["done"], [Unreadable(*one) for one in said["unreadable"]]
        finally:
            if started:
                ray.shutdown()

    def _unimportable(self) -> set[ModuleType]:
        """Modules of the networks' classes that another process would not find, such as one read from a file."""
        found = {type(part).__module__ for network in self.maker.networks() for part in network.modules()}
        found.add(type(self.reader.data).__module__)
        tops = {name: name.partition(".")[0] for name in found}
        # Built-in modules are on no path, and everywhere.
        here = {"__main__", *sys.builtin_module_names}
        strange = [name for name, top in tops.items() if top not in here and PathFinder.find_spec(top) is None]
        return {sys.modules[name] for name in strange if name in sys.modules}

    def _batches(self, shard: list[int]) -> list[list[int]]:
        return [shard[first : first + self.batch_size] for first in range(0, len(shard), self.batch_size)]

    def _write(
        self, shard: list[int], batches: list[list[int]], read: Iterator[list[Any]]
    ) -> tuple[int, list[Unreadable]]:
        """Write one shard; returns the number of its images, and those that could not be read."""
        import pyarrow as pa

        parts: list[pa.Table] = []
        unreadable: list[Unreadable] = []
        for ids, samples in zip(batches, read, strict=True):
            there = [(i, one) for i, one in zip(ids, samples, strict=True) if not isinstance(one, Unreadable)]
            unreadable += [one for one in samples if isinstance(one, Unreadable)]
            if there:
                parts.append(self.maker.rows([one for _, one in there], [i for i, _ in there]))
        if parts:
            write_shard(self.folder, self.configuration, pa.concat_tables(parts), shard)
        return len(shard) - len(unreadable), unreadable


class _Worker:
    """One of Ray's actors: it holds the network, and writes the shards that it is given."""

    def __init__(self, job: Any, threads: int, on_gpu: bool) -> None:
        torch.set_num_threads(threads)
        self.job: _Job = importlib.import_module("ray").get(job)
        if on_gpu:
            self.job.maker.to("cuda")

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        plan = [[int(i) for i in ids] for ids in batch["ids"]]
        said: dict[str, Any]
        try:
            found = list(self.job.local(plan))
            unreadable = [one for _, several in found for one in several]
            said = {"done": sum(done for done, _ in found), "unreadable": unreadable}
        except CEPluginError as error:
            # Said, not raised: Ray would wrap it, and only its text would arrive.
            said = {"error": _public(error), "message": str(error)}
        return {"said": np.array([json.dumps(said)])}


def _public(error: CEPluginError) -> str:
    """The name of the public class of an error."""
    return next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in errors.__all__)


def _ray(cluster: RayCluster) -> tuple[Any, bool]:
    """Ray, connected; and whether it was started here.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        ray: Any = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as error:
        hint = "Install it: pip install 'ce-plugin[cluster]'"
        raise ArgumentError(expected("cluster", "None where Ray is not installed", str(error), hint)) from error
    started = not ray.is_initialized()
    if started and cluster.address is None:
        # Beside the workers' own, a CPU each for the driver's reading tasks: otherwise they would wait for ever.
        needed = cluster.workers * cluster.num_cpus + 2
        cpus = max(needed, os.cpu_count() or 1)
        # What this process can import, the data set's module for one, the workers can.
        environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}}
        ray.init(
            num_cpus=cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
            runtime_env=environment,
        )  # fmt: skip
    elif started:
        ray.init(address=cluster.address)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray, started


class _Reader:
    """The items of a data set in one form; what cannot be read is said instead, or raised.

    Args:
        data: the data set.
        strict: raise.
    """

    def __init__(self, data: Images, strict: bool) -> None:
        self.data, self.strict = data, strict

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Sample | Unreadable:
        try:
            item = self.data[index]
        except _BROKEN as error:
            reason = printable(str(error) or type(error).__name__)
            if not self.strict:
                return Unreadable(index, reason)
            if isinstance(error, CEPluginError):
                raise
            hint = "Without `strict` it is left out."
            raise FileError(expected("data", "images that can be read", f"{index}: {reason}", hint)) from error
        return as_sample(item)


def as_sample(item: Any) -> Sample:
    """An item of a data set as a sample.

    Raises:
        ArgumentError: it is none of the known forms.

    Example:
        >>> as_sample((torch.zeros(1, 2, 2), 3)).label
        3
    """
    if isinstance(item, Sample):
        return item
    if isinstance(item, Tensor):
        return Sample(item)
    if isinstance(item, (tuple, list)) and len(item) == 2:
        label = item[1]
        if isinstance(label, Tensor) and label.numel() == 1:
            label = label.item()
        return Sample(item[0], None if label is None else int(label))
    wanted = "a data set of images, of pairs (image, label), or of Sample"
    raise ArgumentError(expected("data", wanted, f"items of type {type(item).__name__}"))


def _as_they_are(samples: list[Any]) -> list[Any]:
    """Images of a batch stay single: some may be missing."""
    return samples


def _checked_ids(ids: Sequence[int] | None, data: Images) -> list[int]:
    """Which images, in order.

    Raises:
        ArgumentError: no data set with a length.
        InputError: none, one twice, or one that the data set does not have.
    """
    if not isinstance(data, Sized) or not hasattr(data, "__getitem__"):
        hint = "Of a stream take a list."
        raise ArgumentError(expected("data", "a data set with a length and items", type(data).__name__, hint))
    n = len(data)
    found = list(range(n)) if ids is None else [check_integer("ids", i, error=InputError) for i in ids]
    if not found:
        raise InputError(expected("data", "one image or more", "none"))
    if len(set(found)) < len(found):
        twice = next(i for i in found if found.count(i) > 1)
        raise InputError(expected("ids", "each image once", f"{twice} several times"))
    wrong = [i for i in found if not 0 <= i < n]
    if wrong:
        raise InputError(expected("ids", f"from 0 to {n - 1}", wrong[0]))
    return found


def _first(reader: _Reader, ids: list[int]) -> Sample:
    """The first image that can be read.

    Raises:
        InputError: there is none.
    """
    reason = ""
    for i in ids:
        one = reader[i]
        if isinstance(one, Sample):
            return one
        reason = reason or one.reason
    raise InputError(expected("data", "images that can be read", f"none; the first: {reason}"))


def _shards(missing: list[int], size: int) -> list[list[int]]:
    """The missing images in groups; where they lie does not depend on which are missing."""
    groups: Callable[[int], int] = lambda i: i // size  # noqa: E731
    return [list(own) for _, own in itertools.groupby(sorted(missing), groups)]


def _fingerprint(data: Images) -> str:
    """What tells a data set from another: its own ``fingerprint``, or its size and three of its images."""
    own = getattr(data, "fingerprint", None)
    if own is not None:
        return str(own() if callable(own) else own)
    digest = hashlib.blake2b(digest_size=8)
    for index in sorted({0, len(data) // 2, len(data) - 1}):
        try:
            sample = as_sample(data[index])
        except _BROKEN:
            continue
        image: object = sample.image
        if isinstance(image, Tensor):
            digest.update(image.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        digest.update(repr(sample.label).encode())
    return f"{len(data)} images, {digest.hexdigest()}"
