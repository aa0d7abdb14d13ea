"""``ce-plugin concepts``: train the autoencoder of a layer, and show what its concepts are."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ce_plugin.cli._session import Folder, layer_name, manifest, network, say
from ce_plugin.cli.results import json_text
from ce_plugin.concepts import ConceptAutoencoder, train_autoencoder
from ce_plugin.errors import FileError, expected
from ce_plugin.report import check_out, concept_study, save_concepts

__all__ = ["show", "train"]


def train(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Train an autoencoder and write it."""
    out, checkpoint = arguments.out, Path(f"{arguments.out}.checkpoint")
    _check_file(out, checkpoint, arguments)
    net = network(arguments)
    images = Folder(arguments.images, net)
    layer = layer_name(net, images[0][None], arguments.layer)
    say(f"Layer {layer}, {len(images)} pictures, at most {arguments.epochs} epochs", quiet=arguments.quiet)
    record = manifest(arguments, words, net, {"folder": str(arguments.images), "pictures": len(images)})
    try:
        autoencoder = train_autoencoder(
            net.model,
            layer,
            images,  # type: ignore[arg-type] # whatever has a length and items serves as a Dataset
            arguments.concepts,
            hidden=arguments.hidden,
            kernel_size=arguments.kernel_size,
            lambda_shallow=arguments.lambda_shallow,
            lambda_deep=arguments.lambda_deep,
            lambda_interpretability=arguments.lambda_interpretability,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            lr=arguments.learning_rate,
            validation=arguments.held_out,
            patience=arguments.patience,
            checkpoint=checkpoint,
            seed=arguments.seed,
            show_progress=not arguments.quiet,
        )
    except KeyboardInterrupt:
        if checkpoint.exists():
            sys.stderr.write(f"What was trained is in {checkpoint.absolute()}; add --resume to go on from there\n")
        raise
    autoencoder.save(out, force=arguments.force)
    fidelity = None if autoencoder.fidelity is None else autoencoder.fidelity.to_dict()
    found = {"layer": layer, "fidelity": fidelity, "history": autoencoder.history}
    Path(f"{out}.json").write_text(json_text({**record, "findings": found}), encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    say(f"Fidelity on the held-out pictures, which chose the epoch: {autoencoder.fidelity}", quiet=arguments.quiet)
    sys.stdout.write(f"Autoencoder: {out.absolute()}\n")
    return 0


def _check_file(out: Path, checkpoint: Path, arguments: argparse.Namespace) -> None:
    """Whether the training may begin, or go on, before any work."""
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise FileError(expected("out", "a file in an existing folder", repr(str(out))))
    if out.exists() and not arguments.force:
        hint = "Choose another name, or allow it to be replaced with --force."
        raise FileError(expected("out", "a file that does not exist yet", repr(str(out)), hint))
    if arguments.resume and not checkpoint.exists():
        hint = "There is nothing to go on from: leave out --resume."
        raise FileError(
            expected("resume", f"with the file {str(checkpoint)!r} of an interrupted training", "none", hint)
        )
    if checkpoint.exists() and not arguments.resume:
        if not arguments.force:
            hint = "Go on from it with --resume, or begin again with --force."
            raise FileError(expected("out", "without an interrupted training", f"{str(checkpoint)!r}", hint))
        checkpoint.unlink()


def show(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    """Look at the concepts and write a page."""
    check_out(arguments.out, force=arguments.force)
    autoencoder = ConceptAutoencoder.load(arguments.file)
    net = network(arguments)
    images = Folder(arguments.images, net, limit=arguments.limit)
    autoencoder.to(net.device)
    say(
        f"Layer {autoencoder.layer_name}, {autoencoder.concepts} concepts, {len(images)} pictures",
        quiet=arguments.quiet,
    )
    found = concept_study(
        net,
        autoencoder,
        images,
        images.names(),
        top=arguments.top,
        outcome=arguments.outcome,
        min_fidelity=arguments.min_fidelity,
        show_progress=not arguments.quiet,
    )
    record = manifest(
        arguments,
        words,
        net,
        {"folder": str(arguments.images), "pictures": images.names(), "file": str(arguments.file)},
    )
    page = save_concepts(found, arguments.out, model=net.name, outcome=arguments.outcome, manifest=record)
    say(f"{found.fidelity}\n{found.report}", quiet=arguments.quiet)
    sys.stdout.write(f"Concepts: {page.absolute()}\n")
    return 0
